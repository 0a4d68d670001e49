"""What lies on disk between training, snapshots and serving: settings, rows, checkpoint folders."""
