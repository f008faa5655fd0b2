"""Experts with packed weights on Hopper: FP8 that meets FP8 activations (fp8.py), and codes that
become numbers on their way to the tensor cores (ring.py)."""
