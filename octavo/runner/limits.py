"""What a request's own fields leave to draw from: bits of ids, and a short list of biases.

Made by a device's sampler as a row starts; bans that depend on what was put out come with the
step's masks instead. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from octavo.step import Float32, Int32, RowStart, Words


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """Of one sequence."""

    allowed: Words | None
    """[ceil(V / 32)] ids that may ever come; None: all."""
    early: Words | None
    """The same for outputs before number `min_tokens`, which may not end it."""
    min_tokens: int
    bias_ids: Int32
    bias: Float32

    @staticmethod
    def from_start(start: RowStart, vocab_size: int) -> RowLimits | None:
        """Returns what limits the sequence; None if nothing does."""
        params = start.params
        bias = params.logit_bias or {}
        bans = [word[0] for word in params.bad_words_token_ids if len(word) == 1]
        stops = [token for token in start.stop_token_ids if token < vocab_size]
        has_early = bool(stops) and params.min_tokens > 0
        if not (bias or bans or has_early or params.allowed_token_ids is not None):
            return None
        everything = bits_of(range(vocab_size), vocab_size)
        allowed = everything
        if params.allowed_token_ids is not None:
            allowed = bits_of(params.allowed_token_ids, vocab_size)
        later = without(allowed, bits_of(bans, vocab_size))
        early = without(allowed, bits_of([*bans, *stops], vocab_size)) if has_early else None
        return RowLimits(
            allowed=None if np.array_equal(later, everything) else later,
            early=early,
            min_tokens=params.min_tokens if has_early else 0,
            bias_ids=np.array(list(bias), np.int32),
            bias=np.array(list(bias.values()), np.float32),
        )

    def at(self, output_index: int) -> Words | None:
        """Returns the ids that may come as output number `output_index`; None: all."""
        return self.early if output_index < self.min_tokens else self.allowed


def bits_of(token_ids: Iterable[int], vocab_size: int) -> Words:
    """Returns uint32 [ceil(V / 32)] with the bits of these ids set."""
    is_set = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    is_set[np.fromiter(token_ids, np.int64)] = True
    return np.packbits(is_set, bitorder="little").view(np.uint32)


def without(allowed: Words, banned: Words) -> Words:
    """Returns what is left of `allowed`; a token is owed, so that bans of all of it give way."""
    left = allowed & ~banned
    return left if left.any() else allowed


def both(first: Words | None, second: Words | None) -> Words | None:
    """Returns the ids of both; those of the first alone where they have none in common."""
    if first is None or second is None:
        return second if first is None else first
    left = first & second
    return left if left.any() else first
