"""Pipelines ranked by the thousand, in a small simulator of their own."""
