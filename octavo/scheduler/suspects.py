"""Which sequences are computed apart because a step with them raised: one of them may be to blame.

Owned and asked by the scheduler. Pure bookkeeping; it never touches blocks, rows or steps.

A step that raised accuses its sequences: they are halved, and each half is computed with nobody
beside it. A sequence that got as far as in the step that raised is cleared; a half that raises
again is halved again, down to the one that raises alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from octavo.scheduler.sequence import Sequence


class Suspects:
    """Groups of sequences, none in two; the last one is computed next."""

    def __init__(self) -> None:
        self._groups: list[dict[Sequence, int]] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def group(self) -> Collection[Sequence]:
        """Those that are computed next, while there are any."""
        return self._groups[-1].keys()

    def accuse(self, computed: Mapping[Sequence, int]) -> None:
        """A step raised that had computed so many tokens of each sequence."""
        needed = dict(computed)
        for group in self._groups:
            for sequence in group.keys() & needed.keys():
                needed[sequence] = max(needed[sequence], group.pop(sequence))
        items = list(needed.items())
        half = (len(items) + 1) // 2
        self._groups += [dict(items[half:]), dict(items[:half])]
        self._drop_empty()

    def clear(self, sequence: Sequence, num_computed: int) -> None:
        """A step that had computed so many tokens of `sequence` did not raise."""
        for group in self._groups:
            if group.get(sequence, num_computed + 1) <= num_computed:
                del group[sequence]
        self._drop_empty()

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        for group in self._groups:
            group.pop(sequence, None)
        self._drop_empty()

    def _drop_empty(self) -> None:
        self._groups = [group for group in self._groups if group]
