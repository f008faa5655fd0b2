"""A runner without a model: it keeps, for every KV slot, which token was written there.

Its next token is a digest of the context read back through the block tables, so that any wrong,
stale, poisoned or missing block changes a sequence's tokens. Tokens of a sequence depend on its own
ids alone, as those of a real model must.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence

import numpy as np

from octavo.errors import OutOfMemoryError
from octavo.kv_cache.spec import KVGroup
from octavo.step import RowStart, StepPlan, StepResult

VOCAB = 50


def next_token(context: Sequence[int], seed: int) -> int:
    digest = hashlib.blake2b(repr((list(context), seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_tokens(prompt: Sequence[int], seed: int, count: int, window: int | None) -> list[int]:
    """What a sequence yields when it runs alone."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids if window is None else ids[-window:], seed))
    return ids[len(prompt) :]


class PagedMachine:
    """Implements step.Runner. `visible` is the narrowest group: it decides the next token.

    Steps whose ids are in `failing` find no memory: they write nothing.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int,
        block_size: int,
        failing: Container[int] = (),
    ) -> None:
        self.failing = failing
        self.windows = [group.spec.window for group in groups]
        self.block_size = block_size
        self.memory = [
            [[None] * block_size for _ in range(num_blocks)] for _ in groups
        ]  # memory[group][block][offset]; one block belongs to one group at a time
        self.tables: list[dict[int, dict[int, int]]] = [{} for _ in groups]
        self.rows: dict[int, RowStart] = {}
        self.last: dict[int, int] = {}
        self.num_computed = 0

    def launch(self, plan: StepPlan) -> StepResult | OutOfMemoryError:
        for row in plan.freed_rows:
            self.rows.pop(row, None)
            for table in self.tables:
                table.pop(row, None)
        for block in plan.freed_blocks:
            for memory in self.memory:
                memory[block] = [None] * self.block_size
        for start in plan.row_starts:
            self.rows[start.row] = start
        for source, target in plan.copies:
            for memory in self.memory:
                memory[target] = list(memory[source])
        for delta in plan.table_deltas:
            columns = self.tables[delta.group].setdefault(delta.row, {})
            for i, block in enumerate(delta.block_ids.tolist()):
                columns[delta.column + i] = block
        if plan.step_id in self.failing:
            return OutOfMemoryError("no memory")
        try:
            return self._forward(plan)
        except (AssertionError, KeyError):
            if plan.step_id - 1 not in self.failing:
                raise
            # It reads what the lost step has not written: rubbish, which nobody may believe.
            return self._result(plan, [VOCAB - 1] * int(plan.samples.sum()))

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
                for group in range(len(self.windows)):
                    self._write(group, row, position, token)
            pending.append((row, start + length))
        for i, (row, end) in enumerate(pending):
            contexts = [self._read(group, row, end) for group in range(len(self.windows))]
            if plan.samples[i]:
                narrowest = min(contexts, key=len)
                token = next_token(narrowest, self.rows[row].seed)
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

    def _slot(self, group: int, row: int, position: int) -> tuple[list[int | None], int]:
        block = self.tables[group][row][position // self.block_size]
        assert block != 0, f"row {row} uses the null block at position {position}"
        return self.memory[group][block], position % self.block_size  # type: ignore[return-value]

    def _write(self, group: int, row: int, position: int, token: int) -> None:
        slots, offset = self._slot(group, row, position)
        slots[offset] = token

    def _read(self, group: int, row: int, end: int) -> list[int]:
        window = self.windows[group]
        first = 0 if window is None else max(0, end - window)
        context = []
        for position in range(first, end):
            slots, offset = self._slot(group, row, position)
            token = slots[offset]
            assert token is not None, f"row {row} reads poison at position {position}"
            context.append(token)
        return context

    def collect(self, ticket: object) -> StepResult:
        if isinstance(ticket, OutOfMemoryError):
            raise ticket
        assert isinstance(ticket, StepResult)
        return ticket

    def close(self) -> None:
        pass
