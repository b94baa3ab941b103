"""Training: the terms of a recipe (`recipe`, `targets`), one iteration (`step`) and the loop (`train`)."""
