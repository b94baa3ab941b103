"""Figures of stored results. Imports no torch."""
