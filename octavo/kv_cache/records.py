"""What the KV cache manager and the scheduler tell each other of sequences. No decisions.

Made and changed by the manager, read by the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.observe.stats import MissReason
from octavo.step import Int32


@dataclass(slots=True)
class SequenceKV:
    """The KV side of one sequence; changed by the manager only."""

    root: bytes
    """Parent digest of its first block (see prefix_root)."""
    reads_cache: bool = True
    writes_cache: bool = True
    prompt_blocks: int = 0
    """Full blocks of the prompt: those another sequence may wait for."""
    salt: str = ""
    """What of the root keeps its prompt apart from others', for those who are told of blocks."""
    extras: Mapping[int, bytes] = field(default_factory=dict)
    """What blocks hold beside their token ids, by block: an image behind placeholders."""
    row: int | None = None
    digests: list[bytes] = field(default_factory=list)
    num_published: int = 0
    capacity: int = 0
    """Tokens that fit in its blocks."""
    seen_from: int = 0
    """Tokens that were computed when pages behind them were last given back."""
    kept_behind: int = 0
    """Tokens that were computed when pages behind them were kept, as others could not find them
    yet; 0: there are none such."""
    has_claim: bool = False
    """Every page class has the chunks for all that it will hold, and for no more."""
    computing: bytes | None = None
    """Digest of its next unpublished prompt block, on which others may wait."""


class KVRows:
    """What the scheduler asks of all running sequences at once: arrays [max_rows], as in their
    `SequenceKV`; of a row that nobody has, nothing counts."""

    def __init__(self, max_rows: int) -> None:
        self.capacity = np.zeros(max_rows, np.int32)
        self.num_published = np.zeros(max_rows, np.int32)
        self.seen_from = np.zeros(max_rows, np.int32)

    def write(self, kv: SequenceKV) -> None:
        """Something of `kv` has changed."""
        self.capacity[kv.row] = kv.capacity
        self.num_published[kv.row] = kv.num_published
        self.seen_from[kv.row] = kv.seen_from

    def check(self, kv: SequenceKV) -> None:
        """Raises AssertionError unless it is as in `kv`."""
        row = kv.row
        there = (self.capacity[row], self.num_published[row], self.seen_from[row])
        assert there == (kv.capacity, kv.num_published, kv.seen_from), f"row {row} is another"


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What of a sequence's known tokens is cached."""

    num_blocks: int
    is_computing: bool
    """The next block is being computed by a running sequence: wait instead of computing it."""
    miss_reason: MissReason | None
    """Why the next block is missing; None if all full blocks were found."""
    pages: tuple[Int32, ...]
    """Those of every group with which a sequence goes on, holes where it no longer sees any."""


class Demand(NamedTuple):
    """How the pages of `num_groups` alike groups grow with a sequence."""

    page_class: int
    most_pages: int | None
    """Of a sequence of any length; None: there is no bound."""
    num_groups: int
    is_constant: bool
    """It takes the same pages however long it is, all at its admission."""

    def bound(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the most pages that so many columns of a table name."""
        return columns if self.most_pages is None else np.minimum(columns, self.most_pages)
