"""What is proven: exact verdicts and bounds for networks of known layers, randomized smoothing, and their records."""
