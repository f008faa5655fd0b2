"""Pieces of kernels in Gluon: rings of codes (ring.py), sums that programs share (splits.py), and
products of FP8 with FP8 with what becomes of their sums (fp8.py, fp8_ends.py)."""
