"""Modules of a layer: embedding, norm, attention, gate, experts."""
