"""Low-precision snapshots of trained models: export, verify, load, monitor."""
