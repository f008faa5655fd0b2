"""Kernels of one pass over rows: norms, the embedding, activations."""
