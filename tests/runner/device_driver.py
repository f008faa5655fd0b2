"""The driver with a device's equipment: of the GPU where there is one, else of the host."""

from __future__ import annotations

import torch

from octavo.kernels.planning import PlanLimits
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.runner.build import planned_groups
from octavo.runner.device import device_equipment
from octavo.runner.equipment import Equipment
from octavo.runner.graphs import StepGraphs
from octavo.runner.rehearsal import Rehearsal
from octavo.runner.transfer import make_transfer
from tests.kernels.triton.interpreter import DEVICE
from tests.runner.driver import Driver

from octavo.kernels.triton.sampling.kernels import KERNELS  # isort: skip
from octavo.runner.device_sampler import DeviceSampler  # isort: skip


class DeviceDriver(Driver):
    """Drives a device's runner; `use_graphs` and `make_sampler` may be set before the first use."""

    device = torch.device(DEVICE)
    use_graphs = True
    make_sampler: type = DeviceSampler

    def make_equipment(
        self, decoder: Decoder, storage: KVStorage, max_num_seqs: int, max_model_len: int
    ) -> Equipment:
        limits = PlanLimits(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_tokens=storage.num_chunks * storage.block_size,
        )
        groups = planned_groups(decoder, storage.groups, storage.block_size)
        planner = decoder.ops.planner(groups, limits, self.device)
        transfer = make_transfer(self.device)
        sampler = self.make_sampler(
            decoder.spec.vocab_size, max_num_seqs, self.device, KERNELS, transfer.upload
        )
        self.graphs = StepGraphs(is_on=self.use_graphs and self.device.type == "cuda")
        return device_equipment(
            decoder, storage, planner, sampler, self.graphs, transfer, max_model_len
        )

    def rehearsal(self) -> Rehearsal:
        return Rehearsal(self.runner, self.graphs, self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
