"""Processes that score batches."""
