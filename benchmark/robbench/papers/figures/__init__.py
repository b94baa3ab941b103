"""The figures of the papers, drawn from stored results."""
