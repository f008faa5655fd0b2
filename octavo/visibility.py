"""Which earlier tokens a token of one layer sees, as frozen data. No torch.

Named by the specs of models and KV groups, asked by the manager of blocks and by the kernels. A
token always sees itself and nothing behind it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Full:
    """A token sees all tokens before it."""

    def first_visible(self, position: int) -> int:
        """Returns the position of the first token that the one at `position` sees."""
        return 0


@dataclass(frozen=True, slots=True)
class Window:
    """A token sees itself and the `size - 1` tokens before it."""

    size: int

    def first_visible(self, position: int) -> int:
        return max(0, position - self.size + 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A token sees those of its own chunk: positions with the same position // size."""

    size: int

    def first_visible(self, position: int) -> int:
        return position // self.size * self.size


Visibility = Full | Window | Chunk
