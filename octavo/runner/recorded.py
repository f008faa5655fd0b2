"""Decodes of few rows on the host, recorded: the ops of a step are asked for in one call.

Owned by the host's forward pass. A recording reads its inputs where they were, so they are copied
there; there is one for each number of rows, made when it is first met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.kernels.backend import StepRecorder
from octavo.kernels.inputs import AttentionBatch

MAX_ROWS = 4
"""With more the products take so long that what stands between them does not matter."""

Body = Callable[[Tensor, tuple[AttentionBatch, ...]], Tensor]
"""Returns hidden states of token ids and where queries and KV lie."""


class _Recording:
    """Of decodes of so many rows: inputs, result and what makes the one of the others."""

    def __init__(self, recorder: StepRecorder, body: Body, num_rows: int, columns: Sequence[int]):
        def int32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self.token_ids = int32(num_rows)
        positions, seq_lens = int32(num_rows), int32(num_rows)
        starts = torch.arange(num_rows + 1, dtype=torch.int32)
        self.batches = tuple(
            AttentionBatch(
                positions_T=positions,
                slot_mapping_T=torch.zeros(num_rows, dtype=torch.int64),
                query_starts=starts,
                seq_lens_S=seq_lens,
                block_table=int32(num_rows, width),
            )
            for width in columns
        )
        self._recorder = recorder
        self._body = body
        self._result: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def run(self, token_ids: Tensor, batches: Sequence[AttentionBatch]) -> Tensor:
        """Returns what the body does; valid until the next run."""
        self.token_ids.copy_(token_ids)
        for own, new in zip(self.batches, batches, strict=True):
            own.positions_T.copy_(new.positions_T)
            own.slot_mapping_T.copy_(new.slot_mapping_T)
            own.seq_lens_S.copy_(new.seq_lens_S)
            own.block_table[:, : new.block_table.shape[1]] = new.block_table
        if self._replay is not None:
            assert self._result is not None
            self._replay()
            return self._result
        result, replay = self._recorder.record(lambda: self._body(self.token_ids, self.batches))
        self._result, self._replay = result, replay
        return result

    @property
    def is_whole(self) -> bool:
        """Whether everything in the step could be recorded."""
        return self._replay is not None


class RecordedDecodes:
    """Runs decodes of up to MAX_ROWS rows."""

    def __init__(self, recorder: StepRecorder, body: Body, columns: Sequence[int]) -> None:
        """`columns`: of the block tables of each KV group."""
        self._recorder = recorder
        self._body = body
        self._columns = columns
        self._recordings: dict[int, _Recording] = {}
        self._is_on = True

    def takes(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a step of so many rows and tokens is for `run`."""
        return self._is_on and num_rows == num_tokens <= MAX_ROWS

    def run(self, token_ids: Tensor, batches: Sequence[AttentionBatch]) -> Tensor:
        """Returns the hidden states of a step; valid until the next of as many rows."""
        num_rows = len(token_ids)
        recording = self._recordings.get(num_rows)
        if recording is None:
            made = _Recording(self._recorder, self._body, num_rows, self._columns)
            recording = self._recordings[num_rows] = made
        result = recording.run(token_ids, batches)
        if not recording.is_whole:  # the model computes with torch as well
            self._is_on = False
            self._recordings.clear()
        return result
