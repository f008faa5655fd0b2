"""What ops work on beside weights: rows, routes, the KV cache and a step's batch.

Made by the layers and the runner. Shapes as in `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.parallel import Collectives
from octavo.visibility import Visibility

if TYPE_CHECKING:
    from octavo.kernels.ops import Ops


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldParts:
    """What the experts of one rank gave for its part of a sum, not yet added up."""

    rows_TSM: Tensor
    """Those of a token's K choices, in order, and after them what is always there. Where another
    rank has the expert, anything."""
    ids_TK: Tensor
    """int32, negative where another rank has the expert."""

    def added(self) -> Tensor:
        """Returns [T, M]: the parts that are here, added up in order and rounded."""
        num_choices = self.ids_TK.shape[1]
        total = torch.zeros_like(self.rows_TSM[:, 0], dtype=torch.float32)
        for part, rows_TM in enumerate(self.rows_TSM.unbind(1)):
            if part < num_choices:
                rows_TM = rows_TM.where(self.ids_TK[:, part, None] >= 0, 0.0)
            total += rows_TM.float()
        return total.to(self.rows_TSM.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormInput:
    """Rows before their RMSNorm, so that whoever multiplies them may norm them on the way."""

    x_TM: Tensor | HeldParts | None
    """What is added to the residual first: [T, M], or parts [T, S, M] of it (see `Ops.moe`)."""
    residual_TM: Tensor
    """Given away: the op that takes the rows returns residual + x, perhaps in this tensor."""
    weight_M: Tensor
    eps: float
    ranks: Collectives | None = None
    """Over which x is still to be summed."""

    def summed(self) -> NormInput:
        """Returns the rows with x summed over the ranks; x is given away."""
        if self.x_TM is None or self.ranks is None:
            return self
        return replace(self, x_TM=self.ranks.all_reduce(whole(self.x_TM)), ranks=None)

    def normed(self, ops: Ops) -> Tensor:
        """Adds x to the residual in place and returns the normed residual."""
        if self.x_TM is None:
            return ops.rms_norm(self.residual_TM, self.weight_M, self.eps)
        norm = self.residual_TM, self.weight_M, self.eps
        if self.ranks is not None:
            x, ids = self.x_TM, None
            if isinstance(x, HeldParts):
                x, ids = x.rows_TSM, x.ids_TK
            found = self.ranks.add_rms_norm(x, *norm, ids)
            if found is not None:
                return found
        x_TM = self.summed().x_TM
        assert isinstance(x_TM, Tensor)
        return ops.add_rms_norm(x_TM, *norm)


def whole(x: Tensor | HeldParts) -> Tensor:
    """Returns what is to be summed over ranks, added up on this one."""
    return x.added() if isinstance(x, HeldParts) else x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """Normed rows and where they go."""

    x_TM: Tensor
    residual_TM: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_T1: Tensor | None
    """Logits of the shared expert's gate."""


class KVLayer:
    """One layer's part of the arena: its planes by name, strided views [B, P, ...] of B pages of P
    tokens; what a page holds is contiguous. Keys and values are [B, P, K, D], int4 two numbers a
    byte; scales [B, P, K, G] (`kv_codec`)."""

    __slots__ = ("__weakref__", "parts", "planes")

    def __init__(self, parts: tuple[int, ...] = (), /, **planes: Tensor) -> None:
        """`parts`: numbers of each part of a vector, where its parts are quantised by
        themselves."""
        self.planes = planes
        self.parts = parts

    @property
    def key(self) -> Tensor:
        return self.planes["key"]

    @property
    def value(self) -> Tensor:
        return self.planes["value"]

    @property
    def key_scale(self) -> Tensor | None:
        return self.planes.get("key_scale")

    @property
    def value_scale(self) -> Tensor | None:
        return self.planes.get("value_scale")


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
    plan: object | None = None
    """What the back end has planned for it (`octavo.kernels.planning`), if anything."""


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class KVScales:
    """Scales that a checkpoint brings for fp8 keys and values, float32 [K] each: they are stored in
    place of those of each vector, and what is beyond 448 of them is clamped."""

    key_K: Tensor
    value_K: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class KeyChange:
    """What happens to rotated keys before they are mixed and quantised, and to the queries that
    meet them: k becomes (k - shift) / factor, q becomes q * factor. The softmax does
    not notice. Keys and queries of other formats stay as they are."""

    shift_KD: Tensor
    """float32 [K, D]; zeros where there are sinks or a cap, which would notice."""
    factor_KD: Tensor | None = None
    """float32 [K, D], above 0. Where there is one, keys of fp8 are mixed too."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class AttentionOp:
    """What one layer asks of attention: made once at load, the same at every step."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    """Multiplies q . k."""
    visibility: Visibility
    rope: RopeTable | None
    """None: queries and keys are not rotated."""
    qk_norm: QKNorm | None
    sinks_H: Tensor | None = None
    """float32 [H] logit of each head that joins the sum of the softmax and has no value."""
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap), after `scale`."""
    kv_scales: KVScales | None = None
    key_change: KeyChange | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentOp:
    """What one layer asks of latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1): made once at
    load, the same at every step.

    A token keeps its normed latent vector of `rank` numbers and one rotated key of `rope_size`;
    keys and values of the heads are products of the latent vector.
    """

    num_heads: int
    rank: int
    nope_size: int
    """Numbers of a head's query and key that are not rotated; the rotated ones come behind."""
    rope_size: int
    value_size: int
    scale: float
    """Multiplies q . k."""
    rope: RopeTable
    norm_R: Tensor
    norm_eps: float
    weights: object
    """What `Ops.prepare_latent` made of the product of keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """All heads read the same of a token."""
        return 1

    @property
    def expanding_queries(self) -> int:
        """Queries that must meet a token for its keys and values to be worth multiplying out: a
        pair then takes so much less. 0: it never does."""
        head = self.nope_size + self.value_size
        saved = 2 * self.rank - head
        return -(-self.rank * head // saved) if saved > 0 else 0

    @property
    def num_columns(self) -> int:
        """Numbers that a token keeps."""
        return self.rank + self.rope_size
