"""Tokens: from text or token files, in batches that depend on nothing but the step."""
