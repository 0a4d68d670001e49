"""Serving of snapshots over several paths."""
