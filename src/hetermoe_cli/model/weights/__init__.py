"""Weights and optimizer states by name: in checkpoints, and in Hugging Face's form."""
