"""Owns how many of an answer's tokens are reasoning, told by the ids of the markers around it.

Called with the ids as they come. Where markers are no tokens of their own, nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """A reasoning before an answer, in token ids."""

    begins: tuple[int, ...] = ()
    """One of these may be the first token."""
    ends: tuple[int, ...] = ()
    starts_inside: bool = False
    """Whether the prompt has begun it."""
    budget: int | None = None
    """Its tokens at most: one of `ends` comes then; None: as many as it takes."""


NO_THOUGHT = Thought()


class ReasoningTokens:
    """The count of one answer; the markers belong to it."""

    __slots__ = ("_begins", "_ends", "_is_inside", "_previous", "num_tokens")

    def __init__(
        self, begins: Mapping[int, int | None], ends: frozenset[int], *, starts_inside: bool
    ) -> None:
        """`begins`: by id that begins the reasoning, the id that must stand before it, if any."""
        self._begins = begins
        self._ends = ends
        self._is_inside = starts_inside and bool(ends)
        self._previous: int | None = None
        self.num_tokens = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Counts the next ids."""
        if not self._ends:
            return
        for token_id in token_ids:
            if self._is_inside:
                self.num_tokens += 1
                self._is_inside = token_id not in self._ends
            elif token_id in self._begins and self._begins[token_id] in (None, self._previous):
                self.num_tokens += 1
                self._is_inside = True
            self._previous = token_id
