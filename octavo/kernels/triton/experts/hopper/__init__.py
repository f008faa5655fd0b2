"""Experts on Hopper where FP8 weights meet FP8 activations (fp8.py)."""
