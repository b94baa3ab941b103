"""The reproduction of the papers: their published tables, ours beside them, and their figures."""
