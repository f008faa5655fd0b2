"""The version of Octavo, for those of its parts that may import nothing else."""

__version__ = "0.1.0"
