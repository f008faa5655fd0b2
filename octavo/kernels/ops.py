"""The signatures of all device ops.

`reference.py` is the specification (plain torch); `cpu/` and `triton/` implement the same class.
The registry picks one at start. Ops know nothing of requests. `weights.py` and `inputs.py` have
what they take.

Shape legend: T tokens of a step, S sequences, H query heads, K kv heads, D head size, M hidden,
F expert hidden, E experts, N output columns, V vocabulary, B blocks, P block size.

Reductions never depend on the neighbours: row t of a result is bit-identical whatever T, S or the
other rows are, however a prompt is chunked. Activations are float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.inputs import (
    AttentionBatch,
    AttentionOp,
    KVLayer,
    LatentOp,
    NormInput,
    Routed,
)
from octavo.kernels.planning import AttentionPlanner, PlanLimits, PlannedGroup
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight


class Ops(Protocol):
    """What a back end computes. No method keeps state between calls."""

    name: str
    torch_threads: int
    """Threads that torch should use beside these ops (1 where the back end has its own)."""

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        """Returns x_TM float32: rows of `weight` [V, M]. token_ids int32."""
        ...

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        """Returns x / sqrt(mean(x^2) + eps) * weight; x is kept."""
        ...

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        """residual += x in place; returns rms_norm(residual). x may be parts, if this back end's
        `moe` makes some."""
        ...

    def prepare(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        """Returns weights that ops multiply with at once, as these ops do that best, all together
        or each. Called when the numbers have arrived; ops take other weights too, and find at every
        call what can be seen without their numbers."""
        ...

    def prepare_experts(self, experts: ExpertWeights) -> ExpertWeights:
        """The same of experts."""
        ...

    def linear(
        self, x_TM: Tensor, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> Tensor:
        """Returns [T, sum of rows]: x @ W.T for each weight side by side, plus bias."""
        ...

    def norm_linear(
        self, rows: NormInput, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `linear` of the normed rows, and residual + x."""
        ...

    def gated_mlp(
        self, x_TM: Tensor, gate_up: Sequence[Weight], down: Weight, activation: Activation
    ) -> Tensor:
        """Returns (act(x @ gate.T) * (x @ up.T)) @ down.T as [T, M]; gate_up are gate and up."""
        ...

    def logits(self, x_SM: Tensor, weight: Weight) -> Tensor:
        """Returns x @ W.T as float32 [S, V], contiguous."""
        ...

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns topk_weights float32 [T, top_k] and topk_ids int32 [T, top_k], best first, as
        the router's rule has it. A row of NaN takes experts 0, 1, ... Adds the tokens of each
        expert to counts_E (integers, at least E). Ids are those of `Router.held`.

        Tokens from num_live (int32 [1]) on pad a captured graph: their ids are -1, nobody counts
        them."""
        ...

    def norm_route(
        self, rows: NormInput, router: Router, counts_E: Tensor, num_live: Tensor | None = None
    ) -> Routed:
        """Norms the rows, multiplies them with the router's weights and routes them."""
        ...

    def moe(
        self,
        x_TM: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        experts: ExpertWeights,
        activation: Activation,
        shared: SharedExpert | None = None,
        gate_T1: Tensor | None = None,
        *,
        in_parts: bool = False,
    ) -> Tensor:
        """Returns [T, M]: sum over the chosen experts, in the order of topk_ids, of weight times
        the expert's gated MLP. Every expert runs once, over the tokens gathered for it. An id of
        -1 adds nothing. Plus the shared expert's MLP, times sigmoid(gate) where there is one.

        With in_parts the result may also be parts [T, S, M], for `add_rms_norm` to add in order and
        round as if they had been here; rows with ids of -1 then hold anything."""
        ...

    def add_gated(self, out_TM: Tensor, x_TM: Tensor, gate_T1: Tensor | None) -> None:
        """out += sigmoid(gate) * x in place, or out += x without a gate."""
        ...

    def add_shared(
        self,
        out_TM: Tensor,
        x_TM: Tensor,
        shared: SharedExpert | None,
        gate_T1: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        """Returns out + the shared expert's MLP of x, times sigmoid(gate) where there is one; added
        in place."""
        ...

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        """Splits qkv [T, (H + 2K) * D], norms and rotates (half-split, "neox") q and k as `op`
        says, writes k and v to the cache at slot_mapping, in its formats, and returns q_THD
        contiguous, in the basis of the keys (`kv_codec.mix`)."""
        ...

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        """Causal paged attention of what `rope_and_cache` returned; returns [T, H * D].

        out = sum_j e_j v_j / (sum_j e_j + exp(sink)), e_j = exp(cap(scale * q . k_j)), over the
        keys j that `op.visibility` lets the query see; without sinks and caps the terms are not
        there. H // K query heads share a kv head."""
        ...

    def rope_attention(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        """Returns `attention` of what `rope_and_cache` returns."""
        ...

    def prepare_latent(self, kv_b: Weight, num_heads: int, nope_size: int) -> object:
        """Returns `LatentOp.weights` for kv_b [H * (nope + value), rank], whose rows are each
        head's keys and then its values. Called when the numbers have arrived."""
        ...

    def latent_attention(
        self, q_TN: Tensor, latent_TC: Tensor, op: LatentOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        """Norms the latent vectors, rotates keys and queries, writes the layer's plane "latent"
        [B, P, rank + rope] at slot_mapping, in its format, and attends; returns [T, H * value].

        q [T, H * (nope + rope)], latent [T, rank + rope]; rows of both may be apart. Every query
        sees all tokens before it."""
        ...

    def planner(
        self, groups: Sequence[PlannedGroup], limits: PlanLimits, device: torch.device
    ) -> AttentionPlanner:
        """Returns what plans the attention of steps over these KV groups, on `device`."""
        ...

    def copy_blocks(self, arena: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages arena[source] to arena[target], in order."""
        ...
