"""What numbers and lists of a request may be: limits, and the checks that ask them.

Asked by `request` for both faces, and by the server's protocols, whose schemas tell them. Owns no
words for what is wrong: the fields have them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

MAX_LOGPROBS = 100
MAX_PARALLEL_SAMPLES = 64
MAX_LISTED = 65536
"""Token ids in one field: every request's are looked through, and cross processes."""
MAX_TEXTS: Mapping[str, tuple[int, int]] = {"stop": (1024, 65536), "bad_words": (128, 2048)}
"""Stop strings are looked for after every token, bad words are tokenised in several spellings: how
many, and how many characters they may have together."""
MAX_INT = 2**31 - 1
"""The largest token id, count and priority: they travel and are kept in 32 bits."""
SAMPLING_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-37, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-100.0, 100.0),
}
"""Lowest and highest value of each real sampling number. Logits are float32, whose normal numbers
begin at 1.2e-38 and end at 3.4e38: inside these ranges no logit of a sound model leaves them."""


def is_int(value: Any, low: int, high: int = MAX_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def are_ids(values: Collection[Any]) -> bool:
    """Whether all are token ids; at C's speed, since 65,536 may be."""
    if not values:
        return True
    is_right = len(values) <= MAX_LISTED and set(map(type, values)) == {int}
    return is_right and min(values) >= 0 and max(values) <= MAX_INT


def is_number(value: Any, low: float, high: float) -> bool:
    """NaN is in no range; an integer is compared exactly, however large."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and low <= value <= high


@runtime_checkable
class Array(Protocol):
    """What arrays and tensors of all libraries have."""

    @property
    def ndim(self) -> int: ...

    def tolist(self) -> Any: ...
