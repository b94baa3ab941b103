"""Model cards (what a model claims to be), architectures, and the loading of weights nobody has to trust."""
