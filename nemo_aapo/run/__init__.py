"""What a run directory holds and shows: record, metrics, progress, summary, stop signal."""
