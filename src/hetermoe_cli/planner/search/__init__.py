"""The outer search over the layouts of one group, and the heuristics that place experts."""
