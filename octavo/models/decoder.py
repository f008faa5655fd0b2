"""The one forward pass, driven by a ModelSpec.

Made by load_decoder.py, called by the runner. It never knows a family: what differs is data, or a
layer. Everything about a step comes in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, HeldParts, whole
from octavo.kernels.ops import Ops
from octavo.kernels.weights import Weight
from octavo.kv_cache.storage import KVStorage
from octavo.layers.attention import Attention
from octavo.layers.forward import Forward
from octavo.layers.latent import LatentAttention
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.layers.norm import RMSNorm
from octavo.models.pooler import Pooler
from octavo.models.spec import ModelSpec
from octavo.observe.progress import UNWATCHED, Progress
from octavo.parallel import ALONE, Collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    mixer_norm: RMSNorm
    mixer: Attention | LatentAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MoE
    mixer_post_norm: RMSNorm | None = None
    mlp_post_norm: RMSNorm | None = None
    """Norms of what is added to the residual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A loaded model: weights and the ops that run them; no state changes between calls."""

    spec: ModelSpec
    ops: Ops
    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    lm_head: Weight | None
    """None for a model that has no use for logits of the whole vocabulary."""
    pooler: Pooler | None = None
    """Behind a model that makes vectors, or scores, of texts."""
    collectives: Collectives = ALONE
    progress: Progress = UNWATCHED

    def forward(
        self,
        token_ids_T: Tensor,
        batches: tuple[AttentionBatch, ...],
        storage: KVStorage,
        expert_counts_LE: Tensor,
        num_live: Tensor | None = None,
        look: Callable[[AttentionOp, Tensor], None] | None = None,
    ) -> Tensor:
        """Returns normed hidden states [T, M]; writes the step's keys and values.

        token_ids_T is int32; `batches` has one entry per KV group of `storage`. The tokens routed
        to each expert are added to expert_counts_LE, integers [MoE layers, experts]. Tokens from
        num_live (int32 [1]) on pad a captured graph. `look`: see `Forward`.

        Each rank computes its heads and its part of every MLP, and so a part of each sum that goes
        into the residual; the residual is whole and equal on all ranks.
        """
        forward = Forward(
            ops=self.ops,
            batches=batches,
            storage=storage,
            expert_counts_LE=expert_counts_LE,
            num_live=num_live,
            collectives=self.collectives,
            look=look,
        )
        x_TM, residual_TM, ranks = None, self._embedded(token_ids_T), None
        for layer in self.layers:
            self.progress.beat()
            rows = layer.mixer_norm.of(x_TM, residual_TM, ranks)
            x_TM, residual_TM = layer.mixer.run(rows, forward)
            x_TM, ranks = self._post_normed(x_TM, layer.mixer_post_norm)
            rows = layer.mlp_norm.of(x_TM, residual_TM, ranks)
            x_TM, residual_TM = layer.mlp.run(rows, forward)
            x_TM, ranks = self._post_normed(x_TM, layer.mlp_post_norm)
        return self.final_norm.of(x_TM, residual_TM, ranks).normed(self.ops)

    def _embedded(self, token_ids_T: Tensor) -> Tensor:
        x_TM = self.ops.embedding(token_ids_T, self.embedding)
        if self.spec.embedding_scale == 1.0:
            return x_TM
        return x_TM.mul_(torch.tensor(self.spec.embedding_scale, dtype=x_TM.dtype))

    def _post_normed(
        self, x_TM: Tensor | HeldParts, norm: RMSNorm | None
    ) -> tuple[Tensor | HeldParts, Collectives | None]:
        """Returns what is added to the residual, and over whom it is still to be summed: the next
        norm does that on the way, unless another comes first."""
        if norm is None:
            return x_TM, self.collectives
        x_TM = self.collectives.all_reduce(whole(x_TM))
        return self.ops.rms_norm(x_TM, norm.weight, norm.eps), None

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Returns [S, V] float32 of normed hidden states, of a model with a head for tokens."""
        assert self.lm_head is not None
        logits, cap = self.ops.logits(hidden_SM, self.lm_head), self.spec.logit_soft_cap
        if self.lm_head.rows != self.spec.vocab_size:
            logits = self.collectives.all_gather_columns(logits)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
