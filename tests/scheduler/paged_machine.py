"""A runner without a model: it keeps, for every KV slot, which token was written there.

Its next token is a digest of the context read back through the block tables, so that any wrong,
stale, poisoned or missing block changes a sequence's tokens. Tokens of a sequence depend on its own
ids alone, as those of a real model must.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from octavo.errors import OctavoError, OutOfMemoryError
from octavo.kv_cache.spec import KVGroup
from octavo.runner.fence import Fence
from octavo.step import RowStart, StepPlan, StepResult

VOCAB = 50


def next_token(contexts: Sequence[Sequence[int]], seed: int) -> int:
    """Draws from what every group sees."""
    seen = [list(context) for context in contexts]
    digest = hashlib.blake2b(repr((seen, seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_tokens(
    prompt: Sequence[int], seed: int, count: int, groups: Sequence[KVGroup]
) -> list[int]:
    """What a sequence yields when it runs alone."""
    ids = list(prompt)
    for _ in range(count):
        firsts = [group.spec.visibility.first_visible(len(ids) - 1) for group in groups]
        ids.append(next_token([ids[first:] for first in firsts], seed))
    return ids[len(prompt) :]


@dataclass(frozen=True, slots=True)
class Fault:
    """A sequence whose step raises whenever it computes the token at `position`."""

    prompt: tuple[int, ...]
    seed: int
    position: int
    is_early: bool
    """Before anything is done, even to rows and tables; else after all KV is written."""


class StepError(Exception):
    """What a step with a Fault raises."""


class Ticket(NamedTuple):
    generation: int
    result: StepResult | Exception


class PagedMachine:
    """Implements step.Runner. What every group sees decides a token, and where they see the same
    positions they must see the same tokens.

    Steps whose ids are in `failing` find no memory: they write nothing. Those that compute a token
    of `faults` raise.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int,
        block_size: int,
        failing: Container[int] = (),
        faults: Sequence[Fault] = (),
    ) -> None:
        self.failing = failing
        self.faults = {(fault.prompt, fault.seed): fault for fault in faults}
        self.last_raised = -1
        """The newest step that raised or found no memory."""
        self._fence = Fence()
        self.visibilities = [group.spec.visibility for group in groups]
        self.block_size = block_size
        self.memory: list[list[tuple[int, int] | None]] = [
            [None] * block_size for _ in range(num_blocks)
        ]
        """memory[block][offset]: the group that wrote there last, and its token."""
        self.tables: list[dict[int, dict[int, int]]] = [{} for _ in groups]
        self.rows: dict[int, RowStart] = {}
        self.last: dict[int, int] = {}
        self.num_computed = 0

    def launch(self, plan: StepPlan) -> Ticket:
        generation = self._fence.generation
        try:
            with self._fence.guard(generation):
                return Ticket(generation, self._step(plan))
        except (OctavoError, StepError) as error:
            return Ticket(generation, error)

    def _step(self, plan: StepPlan) -> StepResult | Exception:
        """Returns what `collect` raises; raises what leaves the plan's rows and tables unheeded."""
        fault = self._fault(plan)
        if fault is not None and fault.is_early:
            raise self.fail(plan)
        self._update_rows(plan)
        if plan.step_id in self.failing:
            self.last_raised = plan.step_id
            return OutOfMemoryError("no memory")
        try:
            result = self._forward(plan)
        except (AssertionError, KeyError):
            if plan.step_id - 1 != self.last_raised:
                raise
            # It reads what the lost step has not written: rubbish, which nobody may believe.
            result = self._result(plan, [VOCAB - 1] * int(plan.samples.sum()))
        return result if fault is None else self.fail(plan)

    def _fault(self, plan: StepPlan) -> Fault | None:
        starts = {start.row: start for start in (*self.rows.values(), *plan.row_starts)}
        for row, first, length in zip(plan.rows, plan.starts, plan.query_lens, strict=True):
            start = starts.get(row)
            assert start is not None, f"row {row} was never started"
            prompt = tuple(start.token_ids[: start.prompt_len].tolist())
            fault = self.faults.get((prompt, start.seed))
            if fault is not None and first <= fault.position < first + length:
                return fault
        return None

    def fail(self, plan: StepPlan) -> StepError:
        """Returns what a step raises."""
        self.last_raised = plan.step_id
        return StepError(f"step {plan.step_id} raised")

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self.rows.pop(row, None)
            for table in self.tables:
                table.pop(row, None)
        for block in plan.freed_blocks:
            self.memory[block] = [None] * self.block_size
        for start in plan.row_starts:
            self.rows[start.row] = start
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        for delta in plan.table_deltas:
            columns = self.tables[delta.group].setdefault(delta.row, {})
            for i, block in enumerate(delta.block_ids.tolist()):
                columns[delta.column + i] = block

    def _forward(self, plan: StepPlan) -> StepResult:
        sampled, at = [], 0
        pending = []
        for i, row in enumerate(plan.rows.tolist()):
            start, length = int(plan.starts[i]), int(plan.query_lens[i])
            ids = plan.token_ids[at : at + length].tolist()
            at += length
            if plan.from_device[i]:
                ids = [self.last[row]]
            self.num_computed += length
            for position, token in enumerate(ids, start=start):
                for group in range(len(self.visibilities)):
                    self._write(group, row, position, token)
            pending.append((row, start + length))
        for i, (row, end) in enumerate(pending):
            contexts = [self._read(group, row, end) for group in range(len(self.visibilities))]
            widest = max(contexts, key=len)
            for context in contexts:
                assert context == widest[len(widest) - len(context) :], "groups disagree"
            if plan.samples[i]:
                token = next_token(contexts, self.rows[row].seed)
                self.last[row] = token
                sampled.append(token)
        return self._result(plan, sampled)

    def _result(self, plan: StepPlan, sampled: Sequence[int]) -> StepResult:
        return StepResult(
            step_id=plan.step_id,
            token_ids=np.array(sampled, np.int32),
            logprobs={},
            prompt_logprobs={},
        )

    def _slot(
        self, group: int, row: int, position: int
    ) -> tuple[list[tuple[int, int] | None], int]:
        block = self.tables[group][row][position // self.block_size]
        assert block != 0, f"row {row} uses the null block at position {position}"
        return self.memory[block], position % self.block_size

    def _write(self, group: int, row: int, position: int, token: int) -> None:
        slots, offset = self._slot(group, row, position)
        slots[offset] = (group, token)

    def _read(self, group: int, row: int, end: int) -> list[int]:
        first = self.visibilities[group].first_visible(end - 1)
        context = []
        for position in range(first, end):
            slots, offset = self._slot(group, row, position)
            found = slots[offset]
            assert found is not None, f"row {row} reads poison at position {position}"
            assert found[0] == group, f"row {row} reads what group {found[0]} wrote"
            context.append(found[1])
        return context

    def collect(self, ticket: object) -> StepResult:
        assert isinstance(ticket, Ticket)
        if isinstance(ticket.result, Exception):
            self._fence.collect(ticket.generation)
            raise ticket.result
        return ticket.result

    def close(self) -> None:
        pass
