"""Data, training loop, metrics, checkpoints, reports and the command line."""
