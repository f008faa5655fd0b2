"""Which earlier tokens a token of one layer sees, as frozen data. No torch.

Named by the specs of models and KV groups, asked by the manager of blocks and by the kernels. A
token always sees itself and nothing behind it. Tagged, since a memory plan travels between
processes.
"""

from __future__ import annotations

import msgspec


class Full(msgspec.Struct, frozen=True, tag=True):
    """A token sees all tokens before it."""

    def __str__(self) -> str:
        return "all tokens"

    def first_visible(self, position: int) -> int:
        """Returns the position of the first token that the one at `position` sees."""
        return 0

    @property
    def most_visible(self) -> int | None:
        """The most tokens that one token sees, itself included; None: there is no bound."""
        return None


class Window(msgspec.Struct, frozen=True, tag=True):
    """A token sees itself and the `size - 1` tokens before it."""

    size: int

    def __str__(self) -> str:
        return f"a window of {self.size:,} tokens"

    def first_visible(self, position: int) -> int:
        return max(0, position - self.size + 1)

    @property
    def most_visible(self) -> int | None:
        return self.size


class Chunk(msgspec.Struct, frozen=True, tag=True):
    """A token sees those of its own chunk: positions with the same position // size."""

    size: int

    def __str__(self) -> str:
        return f"a chunk of {self.size:,} tokens"

    def first_visible(self, position: int) -> int:
        return position // self.size * self.size

    @property
    def most_visible(self) -> int | None:
        return self.size


Visibility = Full | Window | Chunk


class State(msgspec.Struct, frozen=True, tag=True):
    """A token sees no other, but a state that sums up all before it.

    A sequence keeps one state. What it was behind some of its tokens is kept apart, for others that
    begin with the same: behind each chunk of its prompt that ends with a block, behind the last
    whole block that another may take over, and every `every` tokens while it decodes.
    """

    every: int = 512

    def __str__(self) -> str:
        return "a state"

    def first_visible(self, position: int) -> int:
        return position

    @property
    def most_visible(self) -> int | None:
        return 1


KVVisibility = Visibility | State
"""What layers of any kind see: attention has no states."""
