"""What a runner remembers of each sequence (persistent rows), and the inputs of one step.

Owned and called by the model runner, on its worker thread. It never decides anything: rows, blocks
and tokens are the plan's.

Shape legend: S scheduled rows, T tokens of the step, N sampling rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.ops import AttentionBatch
from octavo.step import Int32, RowStart, StepPlan, TableDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTargets:
    """A row of the plan that wants log-probabilities of its prompt."""

    plan_index: int
    first_token: int
    """Where the row's tokens begin among the step's T."""
    token_ids: Int32
    """token_ids[i] is what the hidden state at first_token + i should predict."""
    num_logprobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step's inputs, made from a plan."""

    token_ids_T: Tensor
    batches: tuple[AttentionBatch, ...]
    """One per KV group."""
    sampling_rows: Int32
    """[N] persistent rows to sample for."""
    last_tokens: Int32
    """[N] index among T of each sampling row's last token."""
    output_indices: Int32
    """[N] outputs that each sampling row has so far."""
    prompt_targets: tuple[PromptTargets, ...]


class InputBatch:
    """The persistent rows: sequences, block tables of every KV group, last sampled tokens."""

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int
    ) -> None:
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self._tables = [np.zeros((max_num_seqs, max_blocks), np.int32) for _ in range(num_groups)]
        self._starts: list[RowStart | None] = [None] * max_num_seqs
        self._prompt_lens = np.zeros(max_num_seqs, np.int32)
        self._wants_prompt = np.zeros(max_num_seqs, np.bool_)
        self._last_sampled = np.zeros(max_num_seqs, np.int32)

    def free(self, row: int) -> None:
        """Forgets the row's sequence."""
        self._starts[row] = None
        self._wants_prompt[row] = False

    def start(self, start: RowStart) -> None:
        """Gives the row to a sequence, whatever it held."""
        self._starts[start.row] = start
        self._prompt_lens[start.row] = start.prompt_len
        self._wants_prompt[start.row] = start.params.prompt_logprobs is not None

    def apply(self, delta: TableDelta) -> None:
        """Writes new blocks into the mirror of a block table."""
        stop = delta.column + len(delta.block_ids)
        self._tables[delta.group][delta.row, delta.column : stop] = delta.block_ids

    def keep_sampled(self, rows: Int32, token_ids: Int32) -> None:
        """Remembers what was sampled, as input of a later step."""
        self._last_sampled[rows] = token_ids

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Returns the inputs of `plan`, whose rows have been started and tables applied."""
        query_starts = np.zeros(plan.num_rows + 1, np.int32)
        np.cumsum(plan.query_lens, out=query_starts[1:])
        token_ids = plan.token_ids.copy()
        token_ids[query_starts[:-1][plan.from_device]] = self._last_sampled[
            plan.rows[plan.from_device]
        ]
        sampling_rows = plan.rows[plan.samples]
        seq_lens = plan.starts + plan.query_lens
        return StepInputs(
            token_ids_T=torch.from_numpy(token_ids),
            batches=self._attention_batches(plan, query_starts, seq_lens),
            sampling_rows=sampling_rows,
            last_tokens=query_starts[1:][plan.samples] - 1,
            output_indices=seq_lens[plan.samples] - self._prompt_lens[sampling_rows],
            prompt_targets=self._prompt_targets(plan, query_starts),
        )

    def _attention_batches(
        self, plan: StepPlan, query_starts: Int32, seq_lens: Int32
    ) -> tuple[AttentionBatch, ...]:
        index_T = np.repeat(np.arange(plan.num_rows), plan.query_lens)
        positions = (plan.starts - query_starts[:-1])[index_T] + np.arange(
            plan.num_tokens, dtype=np.int32
        )
        columns, offsets = np.divmod(positions, self._block_size)
        num_columns = -(-int(seq_lens.max()) // self._block_size)
        shared = {
            "positions_T": torch.from_numpy(positions),
            "query_starts": torch.from_numpy(query_starts),
            "seq_lens_S": torch.from_numpy(seq_lens),
        }
        batches: list[AttentionBatch] = []
        for table in self._tables:
            block_table = table[plan.rows, :num_columns]
            slots = block_table[index_T, columns].astype(np.int64) * self._block_size + offsets
            batches.append(
                AttentionBatch(
                    **shared,
                    slot_mapping_T=torch.from_numpy(slots),
                    block_table=torch.from_numpy(block_table),
                )
            )
        return tuple(batches)

    def _prompt_targets(self, plan: StepPlan, query_starts: Int32) -> tuple[PromptTargets, ...]:
        targets: list[PromptTargets] = []
        for index in np.flatnonzero(self._wants_prompt[plan.rows]).tolist():
            start = self._starts[plan.rows[index]]
            assert start is not None, f"row {plan.rows[index]} was scheduled but never started"
            first = int(plan.starts[index]) + 1
            stop = min(first + int(plan.query_lens[index]), start.prompt_len)
            count = start.params.prompt_logprobs
            if first < stop and count is not None:
                targets.append(
                    PromptTargets(
                        plan_index=index,
                        first_token=int(query_starts[index]),
                        token_ids=start.token_ids[first:stop],
                        num_logprobs=count,
                    )
                )
        return tuple(targets)
