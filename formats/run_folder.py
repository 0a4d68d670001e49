"""A training run's folder: what the trainer writes and readers of its checkpoints look for."""

CHECKPOINTS = "checkpoints"
"""Folder below it that holds the checkpoints, see :mod:`tightrec.formats.checkpoint_files`."""

RUN_FILE = "run.json"
"""JSON object about the run; ``status`` in it says how the run stands."""

FINISHED = "finished"
"""Its status once training has come to its end."""
