"""Data sets: preparation, the one on-disk layout, the reader and the synthetic source."""
