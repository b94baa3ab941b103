"""The only loop that queries a model for a result: lanes of samples, judged at every step."""
