"""Executes step plans on a GPU: the Runner of `octavo.step`, without waiting for the device.

Called by the engine core. `launch` enqueues a step and returns; `collect` waits for its tokens.
Small steps are padded to a shape and replayed as CUDA graphs; all others are launched kernel by
kernel. It never schedules and never touches text.

    launch   rows freed, blocks poisoned, rows started, blocks copied, tables updated, KV written,
             sampled tokens kept on the device for the next step, results on their way to the host
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import EngineDeadError, OutOfMemoryError
from octavo.kernels.planning import AttentionPlanner
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.device_batch import DeviceBatch, DeviceInputs
from octavo.runner.device_sampler import DeviceSampler
from octavo.runner.fence import Fence
from octavo.runner.graphs import StepGraphs, StepShape, padded_size
from octavo.runner.input_batch import InputBatch, StepInputs
from octavo.runner.model_runner import prompt_logprobs_of
from octavo.runner.split import split_plan
from octavo.runner.transfer import Download, make_transfer
from octavo.step import StepPlan, StepResult, TokenLogprobs, Words, single_starts

logger = logging.getLogger(__name__)

COUNTS_PERIOD = 64
"""Steps between two readings of how many tokens went to each expert; so is the last of a run."""


@dataclass(frozen=True, slots=True)
class _Samples:
    """What some of a step's sampling rows have drawn, on its way to the host."""

    places: NDArray[np.int64]
    """Those rows among the sampling ones of their part."""
    download: Download
    logprobs: dict[int, TokenLogprobs]
    """By index into `places`."""


@dataclass(slots=True, kw_only=True)
class _Part:
    """A launched step, or a part of one that was too large."""

    plan: StepPlan
    inputs: StepInputs
    samples: list[_Samples]
    masked: NDArray[np.int64]
    """Sampling rows that wait for their masks."""
    masked_logits_MV: Tensor | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]


@dataclass(slots=True)
class _Ticket:
    plan: StepPlan
    generation: int
    parts: Sequence[_Part] = ()
    counts: Download | None = None
    error: Exception | None = None


class DeviceRunner:
    """Owns what a device remembers of sequences. One thread calls it."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        storage: KVStorage,
        sampler: DeviceSampler,
        max_num_seqs: int,
        max_model_len: int,
        planner: AttentionPlanner,
        device: torch.device,
        use_graphs: bool,
        poison_freed_blocks: bool = False,
    ) -> None:
        self.decoder = decoder
        self.storage = storage
        self._sampler = sampler
        self._planner = planner
        self._poison_freed_blocks = poison_freed_blocks
        self._device = device
        self._transfer = make_transfer(device)
        host = InputBatch(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=storage.block_size,
            num_groups=len(storage.groups),
        )
        self._batch = DeviceBatch(host, sampler.last_sampled, device, self._transfer)
        self._fence = Fence()
        self._graphs = StepGraphs(is_on=use_graphs and device.type == "cuda")
        spec = decoder.spec
        shape = (len(spec.moe_layers), spec.max_experts)
        self._counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._reported_LE = np.zeros(shape, np.int64)
        self._num_under_way = 0
        self.step_bytes = 0
        """The most that a warm-up step took of the device, beyond what lay there before."""

    def launch(self, plan: StepPlan) -> object:
        """Enqueues the step; what it raises, `collect` raises, also of those launched behind it
        before that: they do nothing."""
        self._num_under_way += 1
        generation = self._fence.generation
        try:
            with self._fence.guard(generation), torch.inference_mode(), self._transfer.step():
                self._update_rows(plan)
                parts, counts = self._launch(plan), self._read_counts(plan)
                self.storage.copy(plan.saves, self.decoder.ops)
                return _Ticket(plan, generation, parts, counts)
        except torch.OutOfMemoryError as error:
            # Not the error itself: its traceback would keep the step's tensors.
            return _Ticket(plan, generation, error=OutOfMemoryError(str(error)))
        except Exception as error:
            return _Ticket(plan, generation, error=error)

    def sample(self, ticket: object, masks: Words) -> None:
        """Enqueues the sampling of a launched step's masked rows."""
        assert isinstance(ticket, _Ticket), ticket
        if ticket.error is not None:
            return
        try:
            guard = self._fence.guard(ticket.generation)
            with guard, torch.inference_mode(), self._transfer.step():
                done = 0
                for part in ticket.parts:
                    logits_MV, part.masked_logits_MV = part.masked_logits_MV, None
                    if logits_MV is not None:
                        own = masks[done : done + len(part.masked)]
                        part.samples.append(self._samples(logits_MV, part.masked, part.inputs, own))
                        done += len(own)
        except torch.OutOfMemoryError as error:
            ticket.error = OutOfMemoryError(str(error))
        except Exception as error:
            ticket.error = error

    def collect(self, ticket: object) -> StepResult:
        """Returns the result of a launched step; raises what the step raised, EngineDeadError if
        the device can be used no more since."""
        assert isinstance(ticket, _Ticket), ticket
        self._num_under_way -= 1
        try:
            return self._result(ticket)
        except Exception as error:
            self._fence.collect(ticket.generation)
            if isinstance(error, OutOfMemoryError) or is_usable(self._device):
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise EngineDeadError(f"the device can be used no more: {reason}") from error

    def _result(self, ticket: _Ticket) -> StepResult:
        if ticket.error is not None:
            raise ticket.error
        result, counts = _joined(ticket.plan, ticket.parts), ticket.counts
        if counts is None and not self._num_under_way and self._counts_LE.numel():
            with torch.inference_mode(), self._transfer.step():
                counts = self._transfer.download([self._counts_LE.clone()])
        return result if counts is None else replace(result, expert_counts=self._new_counts(counts))

    def close(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def warm_up(self, plan: StepPlan) -> None:
        """Runs a step of `octavo.runner.warm_up` and waits for it.

        Shows what such a step takes (`step_bytes`). The plan's rows must be free, and are again
        afterwards.
        """
        before = _allocated(self._device)
        self._rehearse(plan)
        self.step_bytes = max(self.step_bytes, _peak(self._device) - before)

    def build(self, plan: StepPlan) -> None:
        """Launches such a step where launches build kernels and run none (`KernelBuilds`): no
        graph meets it, since a capture wants kernels that have been loaded."""
        graphs, self._graphs = self._graphs, StepGraphs(is_on=False)
        try:
            self._rehearse(plan)
        finally:
            self._graphs = graphs

    def _rehearse(self, plan: StepPlan) -> None:
        self.collect(self.launch(plan))
        with self._transfer.step():
            for row in plan.rows.tolist():
                self._batch.host.free(row)
                self._sampler.free_row(row)
            self._counts_LE.zero_()
        self._reported_LE = np.zeros_like(self._reported_LE)

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._batch.host.free(row)
            self._sampler.free_row(row)
        if self._poison_freed_blocks:
            self.storage.poison(plan.freed_pages)
        for start in plan.row_starts:
            self._batch.host.start(start)
            self._sampler.start_row(start)
        self.storage.copy(plan.copies, self.decoder.ops)
        self._batch.apply(plan.table_deltas)

    def _launch(self, plan: StepPlan) -> list[_Part]:
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
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return [launched for part in parts for launched in self._launch(part)]

    def _launch_part(self, plan: StepPlan) -> _Part:
        inputs = self._batch.host.prepare(plan)
        hidden_TM = self._forward(plan, inputs)
        num_samples = len(inputs.sampling_rows)
        is_masked = np.zeros(num_samples, np.bool_)
        if plan.masked is not None:
            is_masked = plan.masked[plan.samples]
        masked, others = is_masked.nonzero()[0], (~is_masked).nonzero()[0]
        samples, masked_logits = [], None
        if num_samples:
            logits_NV = self.decoder.logits(self._last_tokens(hidden_TM, inputs))
            masked_logits = self._rows_of(logits_NV, masked) if len(masked) else None
            if len(others):
                samples = [self._samples(self._rows_of(logits_NV, others), others, inputs)]
        return _Part(
            plan=plan,
            inputs=inputs,
            samples=samples,
            masked=masked,
            masked_logits_MV=masked_logits,
            prompt_logprobs={
                targets.plan_index: prompt_logprobs_of(self.decoder, hidden_TM, targets)
                for targets in inputs.prompt_targets
            },
        )

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
    ) -> _Samples:
        """Enqueues the choice of the sampling rows at `places`."""
        sampled = self._sampler.sample(
            logits_NV,
            inputs.sampling_rows[places],
            inputs.output_indices[places],
            self._transfer.upload,
            masks,
        )
        return _Samples(places, self._transfer.download([sampled.token_ids]), sampled.logprobs)

    def _forward(self, plan: StepPlan, inputs: StepInputs) -> Tensor:
        """Returns the hidden states of the plan's tokens; rows beyond them are padding."""
        attention = self._planner.plan(self._batch.host.step_rows(plan, inputs))
        size = padded_size(plan)
        padded = size and attention.padded(*size)
        if size is None or padded is None:
            return self._run(self._batch.inputs(plan, inputs, attention))
        rows, tokens = size
        shape = StepShape(
            num_rows=rows,
            num_tokens=tokens,
            is_decode=plan.num_rows == plan.num_tokens,
            bounds=padded.bounds,
        )
        self._batch.fill_padded(plan, inputs, padded, shape)
        return self._graphs.run(shape, lambda: self._run(self._batch.padded_inputs(padded, shape)))

    def _run(self, inputs: DeviceInputs) -> Tensor:
        return self.decoder.forward(
            inputs.token_ids_T, inputs.batches, self.storage, self._counts_LE, inputs.num_live
        )

    def _last_tokens(self, hidden_TM: Tensor, inputs: StepInputs) -> Tensor:
        count = len(inputs.last_tokens)
        if count == int(inputs.last_tokens[-1]) + 1:
            return hidden_TM[:count]
        return hidden_TM[self._transfer.upload(inputs.last_tokens)]

    def _read_counts(self, plan: StepPlan) -> Download | None:
        if not self._counts_LE.numel() or plan.step_id % COUNTS_PERIOD:
            return None
        return self._transfer.download([self._counts_LE.clone()])

    def _new_counts(self, download: Download) -> NDArray[np.int64]:
        """Returns what was counted since the last reading."""
        (counts,) = download.wait()
        new = counts - self._reported_LE
        self._reported_LE = counts
        return new


def _joined(plan: StepPlan, parts: Sequence[_Part]) -> StepResult:
    """Returns the results of a step's parts as those of the whole."""
    index_of = {row: index for index, row in enumerate(plan.rows.tolist())}
    tokens: list[NDArray[np.int32]] = []
    logprobs: dict[int, TokenLogprobs] = {}
    prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
    num_samples = 0
    for part in parts:
        token_ids = np.zeros(len(part.inputs.sampling_rows), np.int32)
        for some in part.samples:
            (token_ids[some.places],) = some.download.wait()
            for index, found in some.logprobs.items():
                logprobs[num_samples + int(some.places[index])] = found
        tokens.append(token_ids)
        num_samples += len(token_ids)
        for index, found in part.prompt_logprobs.items():
            whole = index_of[int(part.plan.rows[index])]
            prompts[whole] = prompts.get(whole, ()) + found
    return StepResult(
        step_id=plan.step_id,
        token_ids=np.concatenate(tokens),
        token_starts=single_starts(plan.purposes),
        logprobs=logprobs,
        prompt_logprobs=prompts,
        num_splits=len(parts) - 1,
    )


def is_usable(device: torch.device) -> bool:
    """Returns whether a device still works after an error; waits for what it has to do.

    Some errors of a kernel (an illegal address, a failed assertion) end the process's context for
    good: everything raises from then on.
    """
    if device.type != "cuda":
        return True
    for _ in range(2):  # the first may only repeat what has been raised
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
            return True
    return False


def _allocated(device: torch.device) -> int:
    """Returns the bytes that torch's tensors take now, and starts a new peak from there."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
