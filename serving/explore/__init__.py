"""From snapshots to measured paths."""
