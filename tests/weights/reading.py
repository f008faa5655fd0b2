"""Reads whole sources, for comparisons."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from octavo.weights.source import TensorSource


def read(source: TensorSource, name: str) -> Tensor:
    """Returns the tensor as the models would read it."""
    is_matrix = len(source.shape(name)) == 2
    return source.matrix(name).data if is_matrix else source.vector(name)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    return _status_bytes("RssAnon")


def mapped_bytes() -> int:
    """Memory of this process that files back."""
    return _status_bytes("RssFile")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
