"""Results on disk: their schema, files, locks, recovery and summary. Nothing here imports torch."""
