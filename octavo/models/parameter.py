"""The tensors of a model by canonical name.

Yielded by the specs, named in checkpoints by the families. No torch.
"""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """One tensor of a model by its canonical name; -1 where there is no layer or expert."""

    name: str
    layer: int = -1
    expert: int = -1
