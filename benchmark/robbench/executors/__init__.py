"""Where the work runs beyond one process: the scheduler, and its workers on a Ray cluster."""
