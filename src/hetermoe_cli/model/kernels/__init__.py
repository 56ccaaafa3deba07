"""Functions with backwards of their own: attention, rotation, SwiGLU, experts in one product."""
