"""A stored result checked again: every break derived anew, or the whole run repeated."""
