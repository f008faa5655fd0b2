"""Octavo: a serving engine for mixture-of-experts language models."""

__version__ = "0.1.0"
