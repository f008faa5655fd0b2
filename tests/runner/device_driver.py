"""The driver over a DeviceRunner: on the GPU where there is one, else on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.kernels.planning import PlanLimits
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.build import planned_groups
from octavo.runner.input_batch import StepInputs
from octavo.step import StepPlan, StepResult
from tests.kernels.triton.interpreter import DEVICE
from tests.runner.driver import Driver

from octavo.kernels.triton.sampling.kernels import KERNELS  # isort: skip
from octavo.runner.device_runner import DeviceRunner  # isort: skip
from octavo.runner.device_sampler import DeviceSampler  # isort: skip


class RecordingDeviceRunner(DeviceRunner):
    """Keeps the logits of every token of every step, by step id."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.logits: dict[int, Tensor] = {}
        self._parts: list[Tensor] = []

    def launch(self, plan: StepPlan) -> object:
        self._parts = []
        ticket = super().launch(plan)
        if self._parts:
            with self._transfer.step():
                self.logits[plan.step_id] = torch.cat(self._parts)
        return ticket

    def collect(self, ticket: object) -> StepResult:
        result = super().collect(ticket)
        self.close()  # waits for what comes after the tokens
        self.logits[result.step_id] = self.logits[result.step_id].cpu()
        return result

    def _forward(self, plan: StepPlan, inputs: StepInputs) -> Tensor:
        hidden_TM = super()._forward(plan, inputs)
        self._parts.append(self.decoder.logits(hidden_TM[: plan.num_tokens]).clone())
        return hidden_TM


class DeviceDriver(Driver):
    """Drives the runner of a GPU; `use_graphs` and `sampler` may be set before the first use."""

    device = torch.device(DEVICE)
    use_graphs = True
    make_sampler: type = DeviceSampler

    def make_runner(
        self, decoder: Decoder, storage: KVStorage, max_num_seqs: int, max_model_len: int
    ) -> RecordingDeviceRunner:
        limits = PlanLimits(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_tokens=storage.num_chunks * storage.block_size,
        )
        groups = planned_groups(decoder, storage.groups, storage.block_size)
        sampler = self.make_sampler(decoder.spec.vocab_size, max_num_seqs, self.device, KERNELS)
        return RecordingDeviceRunner(
            decoder=decoder,
            storage=storage,
            sampler=sampler,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            planner=decoder.ops.planner(groups, limits, self.device),
            device=self.device,
            use_graphs=self.use_graphs,
            poison_freed_blocks=True,
        )
