"""A run over its steps: peaks of memory, records, checkpoints, drift, experts that move."""
