"""Data sets: where their files lie, how they are read, checked and downloaded."""
