"""Training: what a recipe means (`recipe`) and the one loop (`train`)."""
