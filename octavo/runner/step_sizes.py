"""What rows and tokens of small steps are padded to: every size is a graph of its own, so there are
few.

Used by a device's forward pass, and by its warm-up, which has all of them captured. Pure numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property

from octavo.step import MAX_PADDED_PROMPT_TOKENS, MAX_PADDED_TOKENS, StepPlan

_DECODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Beyond the last, multiples of 64. Padding costs next to nothing: padded rows read no expert and
no KV."""
_FIRST_ROWS, _ROWS_GROWTH = 16, 4
_FEW_ROWS_TOKENS: tuple[int, ...] = (64, 128, 256, 512, 1024, MAX_PADDED_TOKENS)
"""Where few rows run, the time to a first token is what counts: that of the padding too."""
_LONG_TOKENS = tuple(range(MAX_PADDED_TOKENS + 512, MAX_PADDED_PROMPT_TOKENS + 1, 512))
"""Beyond them, where the engine has these replayed: an eighth of padding in the mean, which only
dense products and norms compute."""
_TOKENS = (512, MAX_PADDED_TOKENS)
"""Beside more decodes: dense products of the padding cost far less than launches one by one."""


class StepSizes:
    """Of steps with at most `max_num_seqs` rows, or of `max_padded_tokens` and few rows."""

    def __init__(self, max_num_seqs: int, max_padded_tokens: int = MAX_PADDED_TOKENS) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_padded_tokens = max_padded_tokens

    @cached_property
    def decodes(self) -> tuple[int, ...]:
        """Rows of steps that compute one token a row."""
        most = self._max_num_seqs
        last = -(-most // 64) * 64
        sizes = (*_DECODES, *range(_DECODES[-1] + 64, last + 1, 64))
        return sizes[: bisect_left(sizes, most) + 1]

    @cached_property
    def mixed(self) -> dict[int, tuple[int, ...]]:
        """Tokens of all other steps that are padded, by rows."""
        last = -(-(self._max_num_seqs + 1) // 16) * 16  # One row at least owns the padding.
        rows = _FIRST_ROWS
        long = (tokens for tokens in _LONG_TOKENS if tokens <= self._max_padded_tokens)
        found = {rows: (*_FEW_ROWS_TOKENS, *long)}
        while rows < last:
            rows *= _ROWS_GROWTH
            rows = last if 2 * rows > last else rows
            found[rows] = tuple(tokens for tokens in _TOKENS if tokens >= rows)
        return {rows: tokens for rows, tokens in found.items() if tokens}

    def all_mixed(self) -> Iterator[tuple[int, int]]:
        """Yields rows and tokens of them."""
        for rows, sizes in self.mixed.items():
            for tokens in sizes:
                yield rows, tokens

    def padded(self, plan: StepPlan) -> tuple[int, int] | None:
        """Returns the rows and tokens that a small step is padded to; None for a large one, which
        keeps the device busy by itself."""
        if plan.num_rows == plan.num_tokens:
            size = self.decodes[bisect_left(self.decodes, plan.num_rows)]
            return size, size
        for rows, sizes in self.mixed.items():
            if plan.num_rows < rows and plan.num_tokens <= sizes[-1]:
                return rows, sizes[bisect_left(sizes, plan.num_tokens)]
        return None
