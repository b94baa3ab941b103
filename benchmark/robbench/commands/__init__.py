"""Commands in modules of their own; `app.py` puts them together."""
