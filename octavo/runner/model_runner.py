"""Executes step plans on one worker thread, in order: the Runner of `octavo.step`.

Called by the engine's executor. It never schedules and never touches text; what a row's sequence
is, which blocks it has and what it computes come from the plan.

    launch(plan)    caller's thread: enqueue          collect(ticket)  caller's thread: wait
    _step(plan)     worker thread, side effects in this order: rows freed, blocks poisoned, rows
                    started, blocks copied, tables updated, KV written, sampled tokens kept
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.fence import Fence
from octavo.runner.input_batch import InputBatch, PromptTargets, StepInputs
from octavo.runner.sampler import Sampler, prompt_logprobs
from octavo.step import StepPlan, StepResult, TokenLogprobs, Words, single_starts

PROMPT_TILE = 64
"""Prompt positions whose logits exist at once: [T, V] of a long prompt would be gigabytes."""


class _Waiting(NamedTuple):
    """What is known of a step whose masked rows are not sampled yet."""

    result: StepResult
    logits_NV: Tensor
    """Of the masked rows."""
    places: NDArray[np.int64]
    """Those rows among the sampling ones."""
    inputs: StepInputs


@dataclass(slots=True)
class _Ticket:
    generation: int
    result: Future[StepResult]
    masked: Future[StepResult] | None = None
    """The same result, when masked rows are sampled too."""
    waiting: _Waiting | None = None


class ModelRunner:
    """Owns the persistent rows and the worker thread.

    A step that fails raises its exception from `collect`, and so do those launched behind it before
    that: they do nothing.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        storage: KVStorage,
        sampler: Sampler,
        max_num_seqs: int,
        max_model_len: int,
        poison_freed_blocks: bool = False,
    ) -> None:
        self.decoder = decoder
        self.storage = storage
        self._sampler = sampler
        self._poison_freed_blocks = poison_freed_blocks
        self._batch = InputBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=storage.block_size,
            num_groups=len(storage.groups),
        )
        self._fence = Fence()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="octavo-runner")

    def launch(self, plan: StepPlan) -> object:
        """Enqueues the step and returns at once."""
        generation = self._fence.generation
        ticket = _Ticket(generation, Future())
        ticket.result = self._worker.submit(self._run, plan, ticket)
        return ticket

    def sample(self, ticket: object, masks: Words) -> None:
        """Enqueues the sampling of a launched step's masked rows and returns at once."""
        assert isinstance(ticket, _Ticket), ticket
        ticket.masked = self._worker.submit(self._run_masked, ticket, masks)

    def collect(self, ticket: object) -> StepResult:
        """Returns the result of a launched step; raises what the step raised."""
        assert isinstance(ticket, _Ticket), ticket
        try:
            result = ticket.result.result()  # first, since it knows what went wrong
            return result if ticket.masked is None else ticket.masked.result()
        except Exception:
            self._fence.collect(ticket.generation)
            raise

    def close(self) -> None:
        """Drops steps that have not begun and ends the worker after the one that has."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, plan: StepPlan, ticket: _Ticket) -> StepResult:
        with self._fence.guard(ticket.generation), torch.inference_mode():
            return self._step(plan, ticket)

    def _run_masked(self, ticket: _Ticket, masks: Words) -> StepResult:
        with self._fence.guard(ticket.generation), torch.inference_mode():
            waiting = ticket.waiting
            assert waiting is not None, "the step has no masked rows"
            result, logits_NV, places, inputs = waiting
            self._sample(logits_NV, places, inputs, result, masks)
            return result

    def _step(self, plan: StepPlan, ticket: _Ticket) -> StepResult:
        self._update_rows(plan)
        inputs = self._batch.prepare(plan)
        spec = self.decoder.spec
        counts_LE = torch.zeros(len(spec.moe_layers), spec.max_experts, dtype=torch.int64)
        hidden_TM = self.decoder.forward(
            self._batch.token_ids(plan, inputs),
            self._batch.attention_batches(plan, inputs),
            self.storage,
            counts_LE,
        )
        self.storage.copy(plan.saves, self.decoder.ops)
        result = StepResult(
            step_id=plan.step_id,
            token_ids=np.zeros(len(inputs.sampling_rows), np.int32),
            token_starts=single_starts(plan.purposes),
            logprobs={},
            prompt_logprobs={
                targets.plan_index: prompt_logprobs_of(self.decoder, hidden_TM, targets)
                for targets in inputs.prompt_targets
            },
            expert_counts=counts_LE.numpy() if spec.moe_layers else None,
        )
        ticket.waiting = self._choose(hidden_TM, plan, inputs, result)
        return result

    def _choose(
        self, hidden_TM: Tensor, plan: StepPlan, inputs: StepInputs, result: StepResult
    ) -> _Waiting | None:
        """Samples the rows that need no masks; returns what the others wait with."""
        if not len(inputs.sampling_rows):
            return None
        logits_NV = self.decoder.logits(hidden_TM[torch.from_numpy(inputs.last_tokens)])
        if plan.masked is None:
            self._sample(logits_NV, np.arange(len(logits_NV)), inputs, result)
            return None
        is_masked = plan.masked[plan.samples]
        masked, others = is_masked.nonzero()[0], (~is_masked).nonzero()[0]
        self._sample(logits_NV[torch.from_numpy(others)], others, inputs, result)
        return _Waiting(result, logits_NV[torch.from_numpy(masked)], masked, inputs)

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._batch.free(row)
            self._sampler.free_row(row)
        if self._poison_freed_blocks:
            self.storage.poison(plan.freed_pages)
        for start in plan.row_starts:
            self._batch.start(start)
            self._sampler.start_row(start)
        self.storage.copy(plan.copies, self.decoder.ops)
        for delta in plan.table_deltas:
            self._batch.apply(delta)

    def _sample(
        self,
        logits_NV: Tensor,
        places: NDArray[np.int64],
        inputs: StepInputs,
        result: StepResult,
        masks: Words | None = None,
    ) -> None:
        """Writes into `result` the tokens of those sampling rows that are at `places`."""
        rows = inputs.sampling_rows[places]
        sampled = self._sampler.sample(logits_NV, rows, inputs.output_indices[places], masks)
        token_ids = sampled.token_ids.numpy()
        # A step that is under way already needs some input for a broken row: any token will do.
        self._batch.keep_sampled(rows, token_ids.clip(min=0))
        result.token_ids[places] = token_ids
        for index, logprobs in sampled.logprobs.items():
            result.logprobs[int(places[index])] = logprobs


def prompt_logprobs_of(
    decoder: Decoder, hidden_TM: Tensor, targets: PromptTargets
) -> tuple[TokenLogprobs, ...]:
    """Returns the log-probabilities of a row's prompt tokens from the step's hidden states."""
    found: list[TokenLogprobs] = []
    for tile in range(0, len(targets.token_ids), PROMPT_TILE):
        token_ids = targets.token_ids[tile : tile + PROMPT_TILE]
        first = targets.first_token + tile
        logits_PV = decoder.logits(hidden_TM[first : first + len(token_ids)]).cpu()
        found.extend(prompt_logprobs(logits_PV, token_ids, targets.num_logprobs))
    return tuple(found)
