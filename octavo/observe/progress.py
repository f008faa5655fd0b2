"""Signs of life while a step is computed, so that a slow step is not taken for a hung one.

Given to a runner by whoever is watched (`engine.process`); an engine that nobody watches (LLM) has
this one, which tells nobody. Never decides what is too slow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class Progress:
    """Tells nobody."""

    def beat(self) -> None:
        """Something has moved: a layer is computed, a step is done, the inbox was looked at."""

    def building(self) -> AbstractContextManager[None]:
        """What happens inside may build kernels, which takes longer than computing."""
        return nullcontext()


UNWATCHED = Progress()
