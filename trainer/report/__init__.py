"""What a run leaves behind: console, TensorBoard, metrics.jsonl, run.json and report.html."""
