"""A runner without a model: it keeps, for all memory of the arena, which token was written there.

Its next token is a digest of the context read back through the block tables, so that any wrong,
stale, poisoned or missing block changes a sequence's tokens. Tokens of a sequence depend on its own
ids alone, as those of a real model must.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from octavo.errors import OctavoError, OutOfMemoryError
from octavo.kv_cache.layout import arena_layout
from octavo.kv_cache.spec import KVGroup
from octavo.runner.fence import Fence
from octavo.step import Float32, PageCopy, Purpose, RowStart, StepPlan, StepResult

VOCAB, UNIT = 50, 4


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
        firsts = [first_seen(group, len(ids) - 1) for group in groups]
        ids.append(next_token([ids[first:] for first in firsts], seed))
    return ids[len(prompt) :]


def first_seen(group: KVGroup, position: int) -> int:
    """A state here is the list of all tokens that went into it."""
    return 0 if group.is_state else group.spec.visibility.first_visible(position)


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
        num_chunks: int,
        block_size: int,
        failing: Container[int] = (),
        faults: Sequence[Fault] = (),
    ) -> None:
        self.failing = failing
        self.faults = {(fault.prompt, fault.seed): fault for fault in faults}
        self.last_raised = -1
        """The newest step that raised or found no memory."""
        self._fence = Fence()
        self.groups = groups
        self.block_size = block_size
        self.layout = arena_layout(groups, block_size)
        self.memory: list[tuple[int, object] | None] = [None] * (
            num_chunks * self.layout.chunk_bytes // UNIT
        )
        """A unit of the arena: the group that wrote there last, and its token, or its state."""
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
            wanted = (plan.purposes == Purpose.VECTOR).nonzero()[0].tolist()
            result.vectors.update(dict.fromkeys(wanted, np.zeros(2, np.float32)))
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
        for page_class, block in plan.freed_pages:
            first, last = self._page(page_class, block)
            self.memory[first:last] = [None] * (last - first)
        for start in plan.row_starts:
            self.rows[start.row] = start
        self._copy(plan.copies)
        for delta in plan.table_deltas:
            changes = zip(delta.rows, delta.columns, delta.block_ids, strict=True)
            for row, column, block in changes:
                self.tables[delta.group].setdefault(int(row), {})[int(column)] = int(block)

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for page_class, source, target in copies:
            first, last = self._page(page_class, target)
            self.memory[first:last] = self.memory[slice(*self._page(page_class, source))]

    def _page(self, page_class: int, block: int) -> tuple[int, int]:
        """Returns the first unit of a page, and the one behind it."""
        stride = self.layout.classes[page_class].stride // UNIT
        return block * stride, (block + 1) * stride

    def _forward(self, plan: StepPlan) -> StepResult:
        sampled, at = [], 0
        pending = []
        vectors: dict[int, Float32] = {}
        for i, row in enumerate(plan.rows.tolist()):
            start, length = int(plan.starts[i]), int(plan.query_lens[i])
            ids = plan.token_ids[at : at + length].tolist()
            at += length
            if plan.from_device[i]:
                ids = [self.last[row]]
            self.num_computed += length
            for position, token in enumerate(ids, start=start):
                for group in range(len(self.groups)):
                    if not self.groups[group].is_state:
                        self._write(group, row, position, token)
            for group in range(len(self.groups)):
                if self.groups[group].is_state:
                    self._advance(group, row, start, ids)
            pending.append((row, start + length))
        for i, (row, end) in enumerate(pending):
            contexts = [self._read(group, row, end) for group in range(len(self.groups))]
            widest = max(contexts, key=len)
            for context in contexts:
                assert context == widest[len(widest) - len(context) :], "groups disagree"
            if plan.samples[i]:
                token = next_token(contexts, self.rows[row].seed)
                self.last[row] = token
                sampled.append(token)
            elif plan.purposes[i] == Purpose.VECTOR:
                vectors[i] = np.array([next_token(contexts, 0), end], np.float32)
        self._copy(plan.saves)
        return replace(self._result(plan, sampled), vectors=vectors)

    def _result(self, plan: StepPlan, sampled: Sequence[int]) -> StepResult:
        return StepResult.single(plan, np.array(sampled, np.int32))

    def _slot(self, group: int, row: int, position: int) -> slice:
        """Returns the units of a token, or of a row's state."""
        is_state = self.groups[group].is_state
        column = 0 if is_state else position // self.block_size
        block = self.tables[group][row][column]
        assert block != 0, f"row {row} uses the null block at position {position}"
        first, _ = self._page(self.layout.class_of[group], block)
        size = self.groups[group].page_bytes(self.block_size) // UNIT
        if is_state:
            return slice(first, first + size)
        size //= self.block_size
        first += position % self.block_size * size
        return slice(first, first + size)

    def _write(self, group: int, row: int, position: int, value: object) -> None:
        slot = self._slot(group, row, position)
        self.memory[slot] = [(group, value)] * (slot.stop - slot.start)

    def _advance(self, group: int, row: int, start: int, ids: Sequence[int]) -> None:
        """Takes tokens into a row's state; what is there before the first one is not read."""
        before = self._at(group, row, start) if start else ()
        assert isinstance(before, tuple)
        assert len(before) == start, f"row {row} goes on at {start} from a state of {len(before)}"
        self._write(group, row, start, (*before, *ids))

    def _at(self, group: int, row: int, position: int) -> object:
        units = self.memory[self._slot(group, row, position)]
        found = units[0]
        assert found is not None, f"row {row} reads poison at position {position}"
        assert found[0] == group, f"row {row} reads what group {found[0]} wrote"
        assert units == [found] * len(units), f"row {row} reads what somebody wrote over"
        return found[1]

    def _read(self, group: int, row: int, end: int) -> list[int]:
        if self.groups[group].is_state:
            state = self._at(group, row, end - 1)
            assert isinstance(state, tuple)
            return list(state)
        first = first_seen(self.groups[group], end - 1)
        tokens = [self._at(group, row, position) for position in range(first, end)]
        return [token for token in tokens if isinstance(token, int)]

    def collect(self, ticket: object) -> StepResult:
        assert isinstance(ticket, Ticket)
        if isinstance(ticket.result, Exception):
            self._fence.collect(ticket.generation)
            raise ticket.result
        return ticket.result

    def close(self) -> None:
        pass
