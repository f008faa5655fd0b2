"""The signatures of all device ops, and the tensors they work on.

`reference.py` is the specification (plain torch); `cpu/` and later `triton/` implement the same
class. The registry picks one at start. Ops know nothing of requests.

Shape legend: T tokens of a step, S sequences, H query heads, K kv heads, D head size, M hidden,
F expert hidden, E experts, N output columns, V vocabulary, B blocks, P block size.

Reductions never depend on the neighbours: row t of a result is bit-identical whatever T, S or the
other rows are, however a prompt is chunked. Activations are float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from octavo.formats import WeightFormat

Activation = Literal["silu", "gelu_tanh"]
RouterScoring = Literal["softmax"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Weight:
    """A matrix [rows, cols] in its storage format: y = x @ W.T has `rows` columns.

    `data` is [rows, cols] in the number's torch dtype, or for block formats uint8
    [rows, row_bytes]; rows are contiguous, and the tensor may be a view of a mapped file.
    """

    data: Tensor
    format: WeightFormat
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpertWeights:
    """The gated MLPs of a MoE layer: act(x @ gate.T) * (x @ up.T) @ down.T, each of length E."""

    gate: tuple[Weight, ...]
    up: tuple[Weight, ...]
    down: tuple[Weight, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class SharedExpert:
    """The gated MLP of a MoE layer that every token goes through."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """What chooses a token's experts: the top_k best scores of x @ weights[0].T."""

    weights: tuple[Weight, ...]
    """[E, M], and the gate of the shared expert [1, M] where there is one."""
    top_k: int
    scoring: RouterScoring
    renormalize: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormInput:
    """Rows before their RMSNorm, so that whoever multiplies them may norm them on the way."""

    x_TM: Tensor | None
    """What is added to the residual first: [T, M], or parts [T, S, M] of it (see `Ops.moe`)."""
    residual_TM: Tensor
    """Given away: the op that takes the rows returns residual + x, perhaps in this tensor."""
    weight_M: Tensor
    eps: float

    def normed(self, ops: Ops) -> Tensor:
        """Adds x to the residual in place and returns the normed residual."""
        if self.x_TM is None:
            return ops.rms_norm(self.residual_TM, self.weight_M, self.eps)
        return ops.add_rms_norm(self.x_TM, self.residual_TM, self.weight_M, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """Normed rows and where they go."""

    x_TM: Tensor
    residual_TM: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_T1: Tensor | None
    """Logits of the shared expert's gate."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class KVLayer:
    """One layer's part of the arena: strided views [B, P, K, D]; [P, K, D] is contiguous."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrefix:
    """Groups of sequences with equal leading blocks, all int32 tensors on the device."""

    members: Tensor
    """Sequence indices, group after group."""
    group_starts: Tensor
    """[groups + 1]: where each group's members begin."""
    shared_tokens_S: Tensor
    """Tokens of each sequence that its group reads for it; 0 outside groups."""
    shared_slots_S: Tensor
    """Partial results that those leave for each sequence."""
    split_sizes: Tensor
    """[groups] tokens of one partial result."""
    piece_starts: Tensor
    """[groups + 1] prefix sums of their pieces of work: tiles of members times partial results."""
    num_groups: int
    max_members: int
    max_splits: int
    max_tail: int
    """Tokens of the longest private tail, or of the longest sequence outside groups."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class AttentionBatch:
    """Where one step's queries and KV lie, for one KV group. Planned once a step."""

    positions_T: Tensor
    """int32 absolute position of every token."""
    slot_mapping_T: Tensor
    """int64 block * P + offset where each token's K and V go."""
    query_starts: Tensor
    """int32 [S + 1] prefix sums of query lengths."""
    seq_lens_S: Tensor
    """int32 tokens visible to each sequence's last query (this step's included)."""
    block_table: Tensor
    """int32 [S, max blocks]; column j holds tokens [j * P, (j + 1) * P). Columns wholly behind
    the window may hold 0 and are not read."""
    max_query_len: int | None = None
    """Bound of the query lengths that the host knows; it saves launches and changes no bit."""
    max_seq_len: int | None = None
    """Bound of seq_lens_S, likewise."""
    num_short_tokens: int | None = None
    """Sequences of few queries lie among the first so many tokens, likewise."""
    slot_starts_S: Tensor | None = None
    """int32 [S + 1] prefix sums of `slot_counts` (kernels/triton/attention_decode.py): where the
    partial results of each single query lie. It saves memory and changes no bit."""
    max_slots: int | None = None
    """Bound of the last of slot_starts_S; goes with it. 0: nobody has a single query."""
    prefix: SharedPrefix | None = None
    """What single-query sequences share, where reading it once pays."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class RopeTable:
    """cos and sin [max positions, rotary_dim // 2] float32, attention scaling multiplied in."""

    cos: Tensor
    sin: Tensor
    rotary_dim: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class QKNorm:
    """RMSNorm of queries and keys before RoPE, over each head or over the whole projection."""

    query: Tensor
    key: Tensor
    eps: float
    per_head: bool
    """True: weights [D] (Qwen3). False: weights [H * D] and [K * D] (OLMoE)."""


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
        self, x_TM: Tensor, gate: Weight, up: Weight, down: Weight, activation: Activation
    ) -> Tensor:
        """Returns (act(x @ gate.T) * (x @ up.T)) @ down.T as [T, M]."""
        ...

    def logits(self, x_SM: Tensor, weight: Weight) -> Tensor:
        """Returns x @ W.T as float32 [S, V], contiguous."""
        ...

    def route(
        self,
        logits_TE: Tensor,
        top_k: int,
        scoring: RouterScoring,
        renormalize: bool,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns topk_weights float32 [T, top_k] and topk_ids int32 [T, top_k], best first;
        equal scores: the lower expert first. Adds the tokens of each expert to counts_E (integers,
        at least E).

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

    def rope_and_cache(
        self,
        qkv_TN: Tensor,
        num_heads: int,
        rope: RopeTable,
        qk_norm: QKNorm | None,
        layer: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        """Splits qkv [T, (H + 2K) * D], norms and rotates (half-split, "neox") q and k, writes k
        and v to the cache at slot_mapping, and returns q_THD float32 contiguous."""
        ...

    def attention(
        self, q_THD: Tensor, layer: KVLayer, batch: AttentionBatch, scale: float, window: int | None
    ) -> Tensor:
        """Causal paged attention; returns [T, H * D]. Query at position p sees keys in
        (p - window, p], or [0, p] without a window. H // K query heads share a kv head."""
        ...

    def rope_attention(
        self,
        qkv_TN: Tensor,
        num_heads: int,
        rope: RopeTable,
        qk_norm: QKNorm | None,
        layer: KVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Returns `attention` of what `rope_and_cache` returns."""
        ...

    def copy_blocks(self, arena: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages arena[source] to arena[target], in order."""
        ...


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype called float32, float16 or bfloat16."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
