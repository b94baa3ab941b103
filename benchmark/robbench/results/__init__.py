"""Results on disk: schema, files, locks, recovery and summary. Nothing here imports torch."""
