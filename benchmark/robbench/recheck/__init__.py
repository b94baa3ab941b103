"""Checks a stored result: by verifying every break, or by running the whole run again."""
