"""Executes step plans on one worker thread, in order: the Runner of `octavo.step`.

Called by the engine's executor. It never schedules and never touches text; what a row's sequence
is, which blocks it has and what it computes come from the plan.

    launch(plan)    caller's thread: enqueue          collect(ticket)  caller's thread: wait
    _step(plan)     worker thread, side effects in this order: rows freed, blocks poisoned, rows
                    started, blocks copied, tables updated, KV written, sampled tokens kept
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.fence import Fence
from octavo.runner.input_batch import InputBatch, PromptTargets, StepInputs
from octavo.runner.sampler import SampledTokens, Sampler, prompt_logprobs
from octavo.step import StepPlan, StepResult, TokenLogprobs

PROMPT_TILE = 64
"""Prompt positions whose logits exist at once: [T, V] of a long prompt would be gigabytes."""


class _Ticket(NamedTuple):
    generation: int
    result: Future[StepResult]


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
        return _Ticket(generation, self._worker.submit(self._run, plan, generation))

    def collect(self, ticket: object) -> StepResult:
        """Returns the result of a launched step; raises what the step raised."""
        assert isinstance(ticket, _Ticket), ticket
        try:
            return ticket.result.result()
        except Exception:
            self._fence.collect(ticket.generation)
            raise

    def close(self) -> None:
        """Drops steps that have not begun and ends the worker after the one that has."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, plan: StepPlan, generation: int) -> StepResult:
        with self._fence.guard(generation), torch.inference_mode():
            return self._step(plan)

    def _step(self, plan: StepPlan) -> StepResult:
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
        sampled = self._sample(hidden_TM, inputs)
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.token_ids.numpy(),
            logprobs=sampled.logprobs,
            prompt_logprobs={
                targets.plan_index: prompt_logprobs_of(self.decoder, hidden_TM, targets)
                for targets in inputs.prompt_targets
            },
            expert_counts=counts_LE.numpy() if spec.moe_layers else None,
        )

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

    def _sample(self, hidden_TM: Tensor, inputs: StepInputs) -> SampledTokens:
        if not len(inputs.sampling_rows):
            return SampledTokens(token_ids=torch.zeros(0, dtype=torch.int32), logprobs={})
        logits_NV = self.decoder.logits(hidden_TM[torch.from_numpy(inputs.last_tokens)])
        rows = inputs.sampling_rows
        sampled = self._sampler.sample(logits_NV, rows, inputs.output_indices)
        # A step that is under way already needs some input for a broken row: any token will do.
        self._batch.keep_sampled(rows, sampled.token_ids.clamp(min=0).numpy())
        return sampled


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
