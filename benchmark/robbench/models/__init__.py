"""Model cards, architectures, model sources, and safe loading of untrusted weights."""
