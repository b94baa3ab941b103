"""Data sets: find, read, check and download their files."""
