"""Keeps a step from running that was launched behind one that raised, before anybody knew.

Owned by a runner. What it would read (rows, block tables) may never have been written, so that it
could write over KV of others. It never raises on its own account: see `guard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from octavo.errors import OctavoError


class Fence:
    """Steps are launched in generations: the next one begins when a failure of this one is
    collected. Once one of a generation has raised, none of it runs any more."""

    def __init__(self) -> None:
        self.generation = 0
        """Of steps that are launched now."""
        self._last_fallen = -1

    @contextmanager
    def guard(self, generation: int) -> Iterator[None]:
        """A step runs inside. Raises OctavoError instead if one of its generation has raised."""
        if generation == self._last_fallen:
            raise OctavoError("the step was dropped, since one before it raised")
        try:
            yield
        except Exception:
            self._last_fallen = generation
            raise

    def collect(self, generation: int) -> None:
        """What a step of this generation raised is known."""
        self.generation = max(self.generation, generation + 1)
