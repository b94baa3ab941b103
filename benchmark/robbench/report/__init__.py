"""Tables, figures and texts for people, made from stored results. Imports no torch."""
