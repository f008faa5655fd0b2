"""One step as the layers see it.

Made by the decoder for each forward pass and handed to every mixer and MLP, which take from it what
they need. Never kept by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.ops import Ops
from octavo.kv_cache.storage import KVStorage
from octavo.parallel import Collectives


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forward:
    """What computes, what the step's rows are, and where the model's state lies."""

    ops: Ops
    batches: tuple[AttentionBatch, ...]
    """One per KV group of `storage`."""
    storage: KVStorage
    expert_counts_LE: Tensor
    """Integers [MoE layers, experts]: a MoE layer adds the tokens sent to each of its experts."""
    num_live: Tensor | None
    """int32 [1]: tokens from here on pad a captured graph; they go to no expert."""
    collectives: Collectives
    look: Callable[[AttentionOp, Tensor], None] | None = None
    """Is shown what each layer of grouped-query attention projects, [T, (H + 2 K) D] before the
    norms and the rotation of its op."""

    @property
    def in_parts(self) -> bool:
        """Whether an MLP may return parts of its sum (see `Ops.moe`): whoever sums them over ranks
        adds them up first."""
        return self.collectives.takes_parts

    def kv(self, layer: int) -> tuple[KVLayer, AttentionBatch]:
        """Returns where a layer's keys and values lie, and its group's rows."""
        return self.storage.layer(layer), self.batches[self.storage.group_of(layer)]
