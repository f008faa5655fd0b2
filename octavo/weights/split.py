"""How tensor parallel ranks share a tensor, and in which order its rows lie.

Made by `models.spec`, applied by `placement`. It never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPairs:
    """Rows that pair neighbours for RoPE: of each `head_size` rows those from `first` on. They are
    loaded with the first of every pair before all the second, as our kernels rotate."""

    head_size: int
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How tensor parallel ranks share a tensor: each takes as many of its units, in rank order."""

    axis: Literal["rows", "cols"]
    unit: str
    """What is not cut, in the plural, for error messages."""
    num_units: int
    may_repeat: bool = False
    """Where ranks outnumber the units, several ranks have the same one (kv heads)."""
    pairs: RowPairs | None = None
    """How the checkpoint orders the rows, if not as they are computed."""

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """Returns which of how many equal parts the rank takes. Raises ConfigError."""
        if self.num_units % size == 0:
            return rank, size
        if self.may_repeat and size % self.num_units == 0:
            return rank * self.num_units // size, self.num_units
        fitting = [str(n) for n in range(1, 2 * size) if self.num_units % n == 0]
        raise ConfigError(
            f"tensor_parallel_size {size} cannot share {self.num_units} {self.unit} evenly; use "
            f"{' or '.join(fitting)}",
            field="tensor_parallel_size",
        )

    def share(self, size: int) -> int:
        """Returns how many units each of `size` ranks has. Raises ConfigError."""
        return self.num_units // self.part(0, size)[1]
