"""How many tokens went to each expert: counted where the experts are, read now and then.

Owned by the model runner. Steps add to one tensor for good; what a reading tells is the difference
to the one before.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.models.spec import ModelSpec
from octavo.runner.transfer import Download, Transfer


class ExpertCounts:
    """Counts of all steps. Readings are taken and told in the same order."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, transfer: Transfer, *, period: int
    ) -> None:
        """`period`: steps between two readings, beside the first and the last of a run."""
        shape = (len(spec.moe_layers), spec.max_experts)
        self.counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        """int64 [MoE layers, experts] on the device, which steps add to."""
        self._transfer = transfer
        self._period = period
        self._told_LE = np.zeros(shape, np.int64)

    def read_at(self, step_id: int) -> Download | None:
        """Returns what is counted up to here, if this step is one to read after."""
        return None if step_id % self._period else self.read()

    def read(self) -> Download | None:
        """Returns what is counted up to here; None for a model without experts."""
        if not self.counts_LE.numel():
            return None
        return self._transfer.download([self.counts_LE.clone()])

    def tell(self, reading: Download) -> NDArray[np.int64]:
        """Returns what was counted since the reading told before."""
        (counts,) = reading.wait()
        new, self._told_LE = counts - self._told_LE, counts
        return new

    def clear(self) -> None:
        """Forgets all that was counted; no reading may be under way."""
        self.counts_LE.zero_()
        self._told_LE = np.zeros_like(self._told_LE)
