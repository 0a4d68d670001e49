"""Runs side by side, and many runs of one comparison in a single job."""
