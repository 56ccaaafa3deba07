"""Rivals: what other methods would run, from the same costs."""
