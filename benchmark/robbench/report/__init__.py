"""What a person reads, made from stored results alone: no torch here."""
