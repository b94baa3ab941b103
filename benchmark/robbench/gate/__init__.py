"""The regression gate: a baseline, a new measurement, paired tests and a decision."""
