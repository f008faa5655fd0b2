"""Executes step plans in order, on a host or a device: the Runner of `octavo.step`.

Called by the engine core or its executor. It never schedules and never touches text; what a row's
sequence is, which blocks it has and what it computes come from the plan. What differs between a
host and a device is its `Equipment`.

    launch(plan)     rows freed, blocks poisoned, rows started, blocks copied, tables updated;
                     inputs, attention planned, forward (KV written), sampled tokens kept for the
                     next step, results on their way to the host, states saved
    sample(ticket)   the rows that waited for masks
    collect(ticket)  the only wait
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import EngineDeadError, OutOfMemoryError
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.equipment import Equipment
from octavo.runner.fence import Fence
from octavo.runner.input_batch import PromptTargets, StepInputs
from octavo.runner.launched import Launched, Part, Samples, joined
from octavo.runner.pooled_rows import PooledRows
from octavo.runner.sampler import prompt_logprobs
from octavo.runner.split import split_plan
from octavo.step import StepPlan, StepResult, TokenLogprobs, Words

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROMPT_TILE = 64
"""Prompt positions whose logits exist at once: [T, V] of a long prompt would be gigabytes."""


@dataclass(slots=True)
class _Ticket:
    plan: StepPlan
    generation: int
    step: Future[Launched] = field(init=False)
    masked: Future[None] | None = None
    """The sampling of the rows that waited for masks, once they are there."""


class ModelRunner:
    """Owns what is remembered of sequences from step to step. One thread calls it.

    A step that fails raises its exception from `collect`, and so do those launched behind it before
    that: they do nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        equipment: Equipment,
        *,
        poison_freed_blocks: bool = False,
    ) -> None:
        self.decoder = decoder
        self.storage = storage
        self._lane = equipment.lane
        self._transfer = equipment.transfer
        self._batch = equipment.batch
        self._planner = equipment.planner
        self._forward = equipment.forward
        self._sampler = equipment.sampler
        self._counts = equipment.counts
        self._pooled = PooledRows.of(decoder, equipment.batch.max_num_seqs, storage.arena.device)
        self._poison_freed_blocks = poison_freed_blocks
        self._fence = Fence()
        self._num_under_way = 0
        self._transfer.follow()

    def launch(self, plan: StepPlan) -> object:
        """Enqueues the step."""
        self._num_under_way += 1
        is_alone = self._num_under_way == 1
        ticket = _Ticket(plan, self._fence.generation)
        ticket.step = self._enqueue(ticket, lambda: self._step(plan, is_alone))
        return ticket

    def sample(self, ticket: object, masks: Words) -> None:
        """Enqueues the sampling of a launched step's masked rows."""
        assert isinstance(ticket, _Ticket), ticket
        step = ticket.step
        ticket.masked = self._enqueue(ticket, lambda: self._sample_masked(step.result(), masks))

    def collect(self, ticket: object) -> StepResult:
        """Returns the result of a launched step; raises what the step raised, EngineDeadError if
        the device can be used no more since."""
        assert isinstance(ticket, _Ticket), ticket
        self._num_under_way -= 1
        try:
            return self._result(ticket)
        except Exception as error:
            self._fence.collect(ticket.generation)
            if isinstance(error, OutOfMemoryError) or self._lane.is_usable():
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise EngineDeadError(f"the device can be used no more: {reason}") from error

    def close(self) -> None:
        """Drops steps that have not begun and waits for those that have."""
        self._lane.close()

    def rehearse(self, plan: StepPlan) -> None:
        """Runs a step whose rows are free, and are again afterwards; nothing is counted."""
        self.collect(self.launch(plan))
        with self._transfer.step():
            for row in plan.rows.tolist():
                self._free(row)
            self._counts.clear()

    def _enqueue(self, ticket: _Ticket, work: Callable[[], T]) -> Future[T]:
        return self._lane.do(lambda: self._guarded(ticket.generation, work))

    def _guarded(self, generation: int, work: Callable[[], T]) -> T:
        try:
            guard = self._fence.guard(generation)
            with guard, torch.inference_mode(), self._transfer.step():
                return work()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Out here, or the new error would keep the old one, and that the step's tensors.
        raise OutOfMemoryError(reason)

    def _result(self, ticket: _Ticket) -> StepResult:
        launched = ticket.step.result()  # first, since it knows what went wrong
        if ticket.masked is not None:
            ticket.masked.result()
        result = joined(ticket.plan, launched.parts, self.decoder.pooler)
        self.decoder.collectives.check()
        counts = launched.counts
        if counts is None and not self._num_under_way:
            with torch.inference_mode(), self._transfer.step():
                counts = self._counts.read()
        return (
            result if counts is None else replace(result, expert_counts=self._counts.tell(counts))
        )

    def _step(self, plan: StepPlan, is_alone: bool) -> Launched:
        """`is_alone`: it may be the last of a run, whose counts then arrive with its tokens."""
        self._update_rows(plan)
        parts = self._launch(plan) if plan.num_rows else []
        counts = self._counts.read() if is_alone else self._counts.read_at(plan.step_id)
        launched = Launched(parts, counts)
        self.storage.copy(plan.saves, self.decoder.ops)
        return launched

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._free(row)
        if self._poison_freed_blocks:
            self.storage.poison(plan.freed_pages)
        for start in plan.row_starts:
            self._batch.start(start)
            self._sampler.start_row(start)
            if self._pooled is not None:
                self._pooled.start(start)
        self.storage.copy(plan.copies, self.decoder.ops)
        self._forward.apply(plan.table_deltas)

    def _free(self, row: int) -> None:
        self._batch.free(row)
        self._sampler.free_row(row)

    def _launch(self, plan: StepPlan) -> list[Part]:
        """Launches the plan, in parts if the device's memory does not suffice for the whole."""
        try:
            return [self._launch_part(plan)]
        except torch.OutOfMemoryError:
            # Ranks compute the same parts: where there are several, one alone cannot split a step.
            parts = split_plan(plan) if self.decoder.collectives.size == 1 else None
            if parts is None:
                raise
        logger.warning(
            "a step of %d tokens ran out of memory and is split; lower gpu_memory_utilization or "
            "max_num_batched_tokens if this goes on",
            plan.num_tokens,
        )
        self._lane.reclaim()
        return [launched for part in parts for launched in self._launch(part)]

    def _launch_part(self, plan: StepPlan) -> Part:
        inputs = self._batch.prepare(plan)
        attention = self._planner.plan(self._batch.step_rows(plan, inputs))
        hidden_TM = self._forward.run(plan, inputs, attention)
        part = Part(
            plan=plan,
            inputs=inputs,
            samples=[],
            masked=_masked(plan),
            masked_logits_MV=None,
            prompt_logprobs={},
        )
        if len(inputs.sampling_rows):
            self._sample_unmasked(hidden_TM, part)
        for targets in inputs.prompt_targets:
            part.prompt_logprobs[targets.plan_index] = self._prompt_logprobs(hidden_TM, targets)
        if self._pooled is not None:
            upload = self._transfer.upload
            states_NM = self._pooled.read(hidden_TM, plan, inputs.query_starts, upload)
            if states_NM is not None:
                part.states = self._transfer.download([states_NM])
        return part

    def _sample_unmasked(self, hidden_TM: Tensor, part: Part) -> None:
        """Enqueues the choice of the rows that need no masks; keeps what the others wait with."""
        logits_NV = self.decoder.logits(self._last_tokens(hidden_TM, part.inputs))
        if not len(part.masked):
            part.samples.append(self._samples(logits_NV, np.arange(len(logits_NV)), part.inputs))
            return
        part.masked_logits_MV = self._rows_of(logits_NV, part.masked)
        others = np.delete(np.arange(len(logits_NV)), part.masked)
        if len(others):
            logits_SV = self._rows_of(logits_NV, others)
            part.samples.append(self._samples(logits_SV, others, part.inputs))

    def _sample_masked(self, launched: Launched, masks: Words) -> None:
        done = 0
        for part in launched.parts:
            logits_MV, part.masked_logits_MV = part.masked_logits_MV, None
            if logits_MV is not None:
                own = masks[done : done + len(part.masked)]
                part.samples.append(self._samples(logits_MV, part.masked, part.inputs, own))
                done += len(own)

    def _last_tokens(self, hidden_TM: Tensor, inputs: StepInputs) -> Tensor:
        count = len(inputs.last_tokens)
        if count == int(inputs.last_tokens[-1]) + 1:
            return hidden_TM[:count]
        return hidden_TM[self._transfer.upload(inputs.last_tokens)]

    def _rows_of(self, logits_NV: Tensor, places: NDArray[np.int64]) -> Tensor:
        if len(places) == len(logits_NV):
            return logits_NV
        return logits_NV[self._transfer.upload(places.astype(np.int32))]

    def _samples(
        self,
        logits_NV: Tensor,
        places: NDArray[np.int64],
        inputs: StepInputs,
        masks: Words | None = None,
    ) -> Samples:
        """Enqueues the choice of the sampling rows at `places`."""
        sampled = self._sampler.sample(
            logits_NV, inputs.sampling_rows[places], inputs.output_indices[places], masks
        )
        return Samples(places, self._transfer.download([sampled.token_ids]), sampled.logprobs)

    def _prompt_logprobs(
        self, hidden_TM: Tensor, targets: PromptTargets
    ) -> tuple[TokenLogprobs, ...]:
        """Returns the log-probabilities of a row's prompt tokens from the step's hidden states."""
        found: list[TokenLogprobs] = []
        for tile in range(0, len(targets.token_ids), PROMPT_TILE):
            token_ids = targets.token_ids[tile : tile + PROMPT_TILE]
            first = targets.first_token + tile
            logits_PV = self.decoder.logits(hidden_TM[first : first + len(token_ids)])
            logits_PV = logits_PV.cpu()  # sync: the host computes what is reported
            found.extend(prompt_logprobs(logits_PV, token_ids, targets.num_logprobs))
        return tuple(found)


def _masked(plan: StepPlan) -> NDArray[np.int64]:
    """Returns which of the plan's sampling rows wait for masks."""
    if plan.masked is None:
        return np.zeros(0, np.int64)
    return plan.masked[plan.samples].nonzero()[0]
