"""What a runner remembers of each sequence (persistent rows), and the inputs of one step.

Owned and called by a runner. It never decides anything: rows, blocks and tokens are the plan's.
Everything here is NumPy; `host` makes tensors of it, `device_batch` puts it on a device.

Shape legend: S scheduled rows, T tokens of the step, N sampling rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo.kernels.planning import StepRows
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
    """One step's inputs, made from a plan; all on the host."""

    positions_T: Int32
    query_starts: Int32
    """[S + 1]"""
    seq_lens_S: Int32
    slots: tuple[Int32, ...]
    """[T] per KV group: block * block size + offset where each token's K and V go."""
    sampling_rows: Int32
    """[N] persistent rows to sample for."""
    last_tokens: Int32
    """[N] index among T of each sampling row's last token."""
    output_indices: Int32
    """[N] outputs that each sampling row has so far."""
    prompt_targets: tuple[PromptTargets, ...]


class InputBatch:
    """The persistent rows: sequences, and block tables of every KV group."""

    def __init__(
        self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int
    ) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.tables = np.zeros((num_groups, max_num_seqs, max_blocks), np.int32)
        """Block tables [groups, rows, columns]."""
        self.max_num_seqs = max_num_seqs
        self.num_started = 0
        """Sequences that have been given a row so far."""
        self._starts: list[RowStart | None] = [None] * max_num_seqs
        self._prompt_lens = np.zeros(max_num_seqs, np.int32)
        self._wants_prompt = np.zeros(max_num_seqs, np.bool_)

    def free(self, row: int) -> None:
        """Forgets the row's sequence."""
        self._starts[row] = None
        self._wants_prompt[row] = False

    def start(self, start: RowStart) -> None:
        """Gives the row to a sequence, whatever it held."""
        self.num_started += 1
        self._starts[start.row] = start
        self._prompt_lens[start.row] = start.prompt_len
        self._wants_prompt[start.row] = start.params.prompt_logprobs is not None

    def apply(self, delta: TableDelta) -> None:
        """Writes new blocks into a block table."""
        self.tables[delta.group, delta.rows, delta.columns] = delta.block_ids

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Returns the inputs of `plan`, whose rows have been started and tables applied."""
        query_starts = np.zeros(plan.num_rows + 1, np.int32)
        np.cumsum(plan.query_lens, out=query_starts[1:])
        samples = plan.samples
        sampling_rows = plan.rows[samples]
        seq_lens = plan.starts + plan.query_lens
        index_T = np.repeat(np.arange(plan.num_rows), plan.query_lens)
        positions = (plan.starts - query_starts[:-1])[index_T] + np.arange(
            plan.num_tokens, dtype=np.int32
        )
        columns, offsets = np.divmod(positions, self.block_size)
        rows_T = plan.rows[index_T]
        return StepInputs(
            positions_T=positions,
            query_starts=query_starts,
            seq_lens_S=seq_lens,
            slots=tuple(
                table[rows_T, columns] * self.block_size + offsets for table in self.tables
            ),
            sampling_rows=sampling_rows,
            last_tokens=query_starts[1:][samples] - 1,
            output_indices=seq_lens[samples] - self._prompt_lens[sampling_rows],
            prompt_targets=self._prompt_targets(plan, query_starts),
        )

    def step_rows(self, plan: StepPlan, inputs: StepInputs) -> StepRows:
        """Returns what the attention of a step is planned from."""
        return StepRows(
            rows=plan.rows,
            query_lens=plan.query_lens,
            query_starts=inputs.query_starts,
            seq_lens=inputs.seq_lens_S,
            tables=tuple(self.tables),
            num_started=self.num_started,
        )

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
