"""A static web site made of stored results: overview, models, comparison and tables. Imports no torch."""
