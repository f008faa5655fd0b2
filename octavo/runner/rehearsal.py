"""Runs steps of nobody on a runner before the first request, and shows what they take.

Used by the builder with the steps of `octavo.runner.warm_up`. Nothing is left of them but kernels.
"""

from __future__ import annotations

import torch

from octavo.runner.graphs import StepGraphs
from octavo.runner.model_runner import ModelRunner
from octavo.step import StepPlan


class Rehearsal:
    """Of one runner, whose rows are all free."""

    def __init__(self, runner: ModelRunner, graphs: StepGraphs, device: torch.device) -> None:
        self._runner = runner
        self._graphs = graphs
        self._device = device
        self.step_bytes = 0
        """The most that a step took of the device, beyond what lay there before."""

    def run(self, plan: StepPlan) -> None:
        """Runs a step and waits for it; see `step_bytes`."""
        before = _allocated(self._device)
        self._runner.rehearse(plan)
        self.step_bytes = max(self.step_bytes, _peak(self._device) - before)

    def build(self, plan: StepPlan) -> None:
        """Launches a step where launches build kernels and run none (`KernelBuilds`): no graph
        meets it, since a capture wants kernels that have been loaded."""
        with self._graphs.ignored():
            self._runner.rehearse(plan)

    def capture(self, plan: StepPlan) -> None:
        """Has a step of the shape of `plan` replayed from now on: the KV cache must be there."""
        for _ in range(2):  # as it is, and captured
            self._runner.rehearse(plan)


def _allocated(device: torch.device) -> int:
    """Returns the bytes that torch's tensors take now, and starts a new peak from there."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
