"""What a run keeps and reports: checkpoints, metrics, status, and how its ranks agree."""
