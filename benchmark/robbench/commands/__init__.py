"""Commands in modules of their own; `cli.py` puts them together."""
