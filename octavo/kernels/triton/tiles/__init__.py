"""Device functions that launch nothing: the pieces of which kernels are made."""
