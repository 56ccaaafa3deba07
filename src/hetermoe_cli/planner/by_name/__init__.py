"""Experts by name, which an expert load asks for: each layer levelled over the ranks."""
