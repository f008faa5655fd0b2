"""Collects one step's rows and turns them into a StepPlan. No decisions are made here."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator

import numpy as np

from octavo.kv_cache.manager import KVCacheManager
from octavo.moments import Moment
from octavo.scheduler.sequence import Sequence
from octavo.step import Purpose, RowStart, StepPlan


class PlanBuilder:
    """Filled by the scheduler while it walks its queues, then built once."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.sequences: list[Sequence] = []
        self.purposes: list[Purpose] = []
        self._prefill_starts: dict[Sequence, int] = {}
        """Sequences whose prompt is being computed in this very step, and from where."""
        self._rows: list[int | None] = []
        self._starts: list[int] = []
        self._lens: list[int] = []
        self._from_device: list[bool] = []
        self._token_ids = array("i")
        self._row_starts: list[RowStart] = []
        self._masked: list[bool] = []

    def start_row(self, sequence: Sequence) -> None:
        """The sequence takes its row in this step."""
        assert sequence.row is not None
        self._row_starts.append(
            RowStart(
                row=sequence.row,
                params=sequence.request.params,
                seed=sequence.seed,
                stop_token_ids=tuple(sorted(sequence.stop_ids)),
                prompt_len=sequence.prompt_len,
                token_ids=np.array(sequence.token_ids, np.int32),
                wants_vector=sequence.request.wants_vector,
            )
        )

    def add_decodes(self, sequences: list[Sequence]) -> None:
        """Computes of each the one token that the device sampled last."""
        count = len(sequences)
        self.sequences += sequences
        self._rows += [one.row for one in sequences]
        self._starts += [one.num_computed for one in sequences]
        self._lens += [1] * count
        self._from_device += [True] * count
        self._token_ids.extend([0] * count)
        self.purposes += [Purpose.TOKEN] * count
        self._masked += [one.is_masked for one in sequences]
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.num_pending += 1
            sequence.account.computed += 1

    def add(self, sequence: Sequence, count: int) -> None:
        """Computes `count` more tokens of `sequence` and advances its counters."""
        start = sequence.num_computed
        end = start + count
        known = len(sequence.token_ids)
        assert sequence.row is not None
        self.sequences.append(sequence)
        self._rows.append(sequence.row)
        self._starts.append(start)
        self._lens.append(count)
        if start >= known:
            self._from_device.append(True)
            self._token_ids.append(0)
        else:
            self._from_device.append(False)
            self._token_ids.extend(sequence.token_ids[start:end])
        if start < sequence.prompt_len:
            self._prefill_starts[sequence] = start
        if sequence.moments is not None and (count > 1 or start < sequence.prompt_len):
            moment = Moment("prefill", time.monotonic(), first=start, count=count)
            sequence.moments.append(moment)
        sequence.num_computed = end
        sequence.account.computed += count
        is_last = end == known + sequence.num_pending
        purpose = Purpose.NONE
        if is_last:
            purpose = Purpose.VECTOR if sequence.request.wants_vector else Purpose.TOKEN
            sequence.num_pending += 1
        self.purposes.append(purpose)
        self._masked.append(is_last and sequence.is_masked)

    def start_of(self, sequence: Sequence) -> int:
        """Returns how many tokens of a prompt are computed when this step begins; of one that is
        computed, its tokens."""
        return self._prefill_starts.get(sequence, sequence.num_computed)

    def spans(self) -> Iterator[tuple[Sequence, int, int]]:
        """Yields each sequence with the first token that the step computes of it, and the end."""
        yield from zip(self.sequences, self._starts, self.computed(), strict=True)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def room(self) -> int:
        """Tokens that the step may still take."""
        return max(0, self.max_tokens - len(self._token_ids))

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    def build(self, step_id: int, freed_rows: tuple[int, ...], manager: KVCacheManager) -> StepPlan:
        return StepPlan(
            step_id=step_id,
            rows=np.array(self._rows, np.int32),
            starts=np.array(self._starts, np.int32),
            query_lens=np.array(self._lens, np.int32),
            token_ids=np.array(self._token_ids, np.int32),
            from_device=np.array(self._from_device, np.bool_),
            purposes=np.frombuffer(bytes(self.purposes), np.int8),
            masked=np.array(self._masked, np.bool_) if any(self._masked) else None,
            row_starts=tuple(self._row_starts),
            freed_rows=freed_rows,
            freed_pages=manager.take_emptied(),
            copies=manager.take_copies(),
            saves=manager.take_saves(),
            table_deltas=manager.take_deltas(),
        )

    def computed(self) -> list[int]:
        """Returns, parallel to `sequences`, how many of their tokens this step has computed."""
        return [start + count for start, count in zip(self._starts, self._lens, strict=True)]
