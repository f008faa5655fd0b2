"""The numbers of running sequences by row, in arrays: a step looks at all of them at once.

Owned by `Queues`. While a sequence runs its counters are kept here, and nowhere else; plans and
commits of a thousand decodes read and write them without a look at each sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.step import Bool, Int32

if TYPE_CHECKING:
    from octavo.scheduler.sequence import Sequence

MAX_STOPS = 4
"""Ids that end a sequence which are compared for all rows at once; a sequence with more of them is
looked at by itself."""
FEW_ROWS = 8
"""So many are sooner looked at one by one than by arrays."""
NO_STOP = -2
"""No id and no `NO_TOKEN`."""


class Rows:
    """Arrays [max_num_seqs]; of a row that nobody has, nothing counts."""

    def __init__(self, max_num_seqs: int) -> None:
        self.known = np.zeros(max_num_seqs, np.int32)
        """Tokens that the host knows."""
        self.pending = np.zeros(max_num_seqs, np.int32)
        """Tokens sampled on the device and not known to the host yet."""
        self.computed = np.zeros(max_num_seqs, np.int32)
        """Tokens whose KV is computed by a launched step."""
        self.committed = np.zeros(max_num_seqs, np.int32)
        """Tokens whose KV is computed by a step that is committed; 0 until one is."""
        self.prompt_lens = np.zeros(max_num_seqs, np.int32)
        self.max_lens = np.zeros(max_num_seqs, np.int32)
        self.stops = np.full((max_num_seqs, MAX_STOPS), NO_STOP, np.int32)
        self.writes_cache = np.zeros(max_num_seqs, np.bool_)
        self.is_masked = np.zeros(max_num_seqs, np.bool_)
        self.wants_vector = np.zeros(max_num_seqs, np.bool_)
        self.is_plain = np.zeros(max_num_seqs, np.bool_)
        """Whether nothing but its tokens is told of it, whatever they are, and `stops` has all ids
        that end it."""
        self.holders = np.zeros(max_num_seqs, np.int64)
        """Grows when a row changes hands: equal numbers, equal holders."""
        self.sequences: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        self.request_ids: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        self.indices: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        self.token_ids: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        """The growing list itself."""
        self.num_cached_tokens: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        self.scheduled_times: NDArray[np.object_] = np.full(max_num_seqs, None, object)
        self.accounts: NDArray[np.object_] = np.full(max_num_seqs, None, object)

    def take(self, row: int, sequence: Sequence) -> None:
        """A sequence has the row from now on."""
        request = sequence.request
        self.known[row] = len(sequence.token_ids)
        self.pending[row] = sequence.num_pending
        self.computed[row] = sequence.num_computed
        self.committed[row] = 0
        self.prompt_lens[row] = sequence.prompt_len
        self.max_lens[row] = sequence.max_len
        num_stops = len(sequence.stop_ids)
        self.stops[row] = NO_STOP
        if num_stops <= MAX_STOPS:
            self.stops[row, :num_stops] = list(sequence.stop_ids)
        self.writes_cache[row] = sequence.kv.writes_cache
        self.is_masked[row] = sequence.is_masked
        self.wants_vector[row] = request.wants_vector
        self.is_plain[row] = (
            sequence.guide is None
            and sequence.moments is None
            and sequence.prompt_logprobs is None
            and request.params.logprobs is None
            and num_stops <= MAX_STOPS
        )
        self.holders[row] += 1
        self.sequences[row] = sequence
        self.request_ids[row] = request.request_id
        self.indices[row] = sequence.index
        self.token_ids[row] = sequence.token_ids
        self.num_cached_tokens[row] = sequence.num_cached_tokens
        self.scheduled_times[row] = sequence.scheduled_time
        self.accounts[row] = sequence.account

    def leave(self, rows: list[int]) -> None:
        """Nobody has the rows."""
        self.holders[rows] += 1
        for of_holder in (
            self.sequences,
            self.request_ids,
            self.token_ids,
            self.scheduled_times,
            self.accounts,
        ):
            of_holder[rows] = None

    def num_tokens(self, rows: Int32) -> Int32:
        """Returns the known and pending tokens of rows."""
        return self.known[rows] + self.pending[rows]

    def are_decoding(self, rows: Int32) -> Bool:
        """Returns which of `rows` have one token to compute."""
        return self.num_tokens(rows) - self.computed[rows] == 1

    def end_with(self, rows: Int32, token_ids: Int32) -> Bool:
        """Returns which rows a new token of each ends, whatever `min_tokens` says."""
        return (self.stops[rows] == token_ids[:, None]).any(axis=1)
