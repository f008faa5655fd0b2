"""Every op in plain torch: the specification that kernels are tested against, and the fallback.

Chosen by the registry where no faster back end fits. Accurate to float32, never holds more than
a tile of scores or of dequantised weights; does not promise bit-identical rows across batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.activations import Activation, ClampedSwiGLU
from octavo.kernels.composed import Composed
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, QKNorm
from octavo.kernels.kv_pages import format_of, mixed_as, read_vectors, write_vectors
from octavo.kernels.routing import RoutingRule, Score
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight
from octavo.visibility import Chunk, Full, Visibility, Window

PANEL_ELEMENTS = 1 << 22
"""Weights converted to float32 at a time (16 MiB)."""
QUERY_TILE = 128
KV_TILE = 256


def activate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Returns what the activation makes of gate and up; both are given away."""
    if isinstance(activation, ClampedSwiGLU):
        gate = gate.clamp_(max=activation.limit)
        up = up.clamp_(-activation.limit, activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if activation == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def choose_experts(logits_TE: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Returns weights float32 and ids int32, both [T, top_k]; see `RoutingRule`."""
    rule = router.rule
    scores = expert_scores(logits_TE, rule.score)
    choice = scores if router.correction_E is None else scores + router.correction_E
    if rule.num_groups > 1:
        choice = _within_groups(choice, rule)
    order = torch.sort(choice, dim=-1, descending=True, stable=True)
    chosen = order.indices[:, : rule.top_k]
    weights = scores.gather(1, chosen)
    if rule.weighting == "softmax":
        weights = torch.softmax(logits_TE.gather(1, chosen), -1)
    elif rule.weighting == "sigmoid":
        weights = torch.sigmoid(logits_TE.gather(1, chosen))
    if rule.renormalize:
        total = weights.sum(-1, keepdim=True)
        if rule.sum_epsilon:
            total += rule.sum_epsilon
        weights /= total.clamp_(min=rule.least_sum) if rule.least_sum else total
    if rule.scale != 1.0:
        weights *= rule.scale
    if router.scale_E is not None:
        weights *= router.scale_E[chosen]
    return weights, chosen.to(torch.int32)


def expert_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Returns the scores of all experts [T, E]."""
    if score == "softmax":
        return torch.softmax(logits_TE, -1)
    if score == "sigmoid":
        return torch.sigmoid(logits_TE)
    if score == "sqrt_softplus":
        return functional.softplus(logits_TE).sqrt_()
    return logits_TE


def _within_groups(choice_TE: Tensor, rule: RoutingRule) -> Tensor:
    """Returns the scores with -inf in all but the best groups."""
    groups = choice_TE.view(len(choice_TE), rule.num_groups, -1)
    count = 2 if rule.group_score == "best_two" else 1
    best = groups.topk(count, dim=-1).values.sum(-1)
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices
    is_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, order[:, : rule.top_groups], False)
    return groups.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(1)


class ReferenceOps(Composed):
    """The ops of `octavo.kernels.ops.Ops` in plain torch."""

    name = "reference"

    def __init__(self, num_threads: int) -> None:
        self.torch_threads = num_threads

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        return dequantize_rows(weight, token_ids_T.long())

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x_TM.square().mean(-1, keepdim=True) + eps)
        return x_TM * scale * weight_M.float()

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        residual_TM += x_TM
        return self.rms_norm(residual_TM, weight_M, eps)

    def linear(
        self, x_TM: Tensor, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> Tensor:
        out = x_TM.new_empty(x_TM.shape[0], sum(w.rows for w in weights))
        column = 0
        for weight in weights:
            panel = max(1, PANEL_ELEMENTS // weight.cols)
            for start in range(0, weight.rows, panel):
                rows = slice(start, min(start + panel, weight.rows))
                part = x_TM @ dequantize_rows(weight, rows).T
                out[:, column + rows.start : column + rows.stop] = part
            column += weight.rows
        return out if bias_N is None else out.add_(bias_N)

    def gated_mlp(
        self, x_TM: Tensor, gate_up: Sequence[Weight], down: Weight, activation: Activation
    ) -> Tensor:
        gate, up = gate_up
        hidden = activate(self.linear(x_TM, (gate,)), self.linear(x_TM, (up,)), activation)
        return self.linear(hidden, (down,))

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = choose_experts(logits_TE.float(), router)
        if num_live is not None:
            ids[int(num_live) :] = -1
        live = ids[: None if num_live is None else int(num_live)]
        counts_E += torch.bincount(live.flatten(), minlength=len(counts_E))
        return weights, router.held_ids(ids)

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
        top_k = topk_ids.shape[1]
        chosen = topk_ids.reshape(-1)
        parts = x_TM.new_zeros(len(chosen), x_TM.shape[1])
        for expert in chosen[chosen >= 0].unique().tolist():
            picks = torch.nonzero(chosen == expert).squeeze(1)
            parts[picks] = self._expert(x_TM[picks // top_k], experts, expert, activation)
        parts = parts.view(-1, top_k, x_TM.shape[1])
        out = parts[:, 0] * topk_weights[:, :1]
        for place in range(1, top_k):
            out += parts[:, place] * topk_weights[:, place : place + 1]
        return self.add_shared(out, x_TM, shared, gate_T1, activation)

    def _expert(
        self, x_TM: Tensor, experts: ExpertWeights, expert: int, activation: Activation
    ) -> Tensor:
        gate, up, down = experts.gate[expert], experts.up[expert], experts.down[expert]
        biases = experts.biases
        if biases is None:
            return self.gated_mlp(x_TM, (gate, up), down, activation)
        gate_TF = self.linear(x_TM, (gate,), biases.gate_EF[expert])
        up_TF = self.linear(x_TM, (up,), biases.up_EF[expert])
        return self.linear(activate(gate_TF, up_TF, activation), (down,), biases.down_EM[expert])

    def add_gated(self, out_TM: Tensor, x_TM: Tensor, gate_T1: Tensor | None) -> None:
        out_TM += x_TM if gate_T1 is None else x_TM * torch.sigmoid(gate_T1)

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        heads = [op.num_heads, op.num_kv_heads, op.num_kv_heads]
        q, k, v = qkv_TN.split([count * op.head_size for count in heads], dim=1)
        norm = op.qk_norm
        if norm is not None:
            q, k = self._qk_norm(q, norm.query, norm), self._qk_norm(k, norm.key, norm)
        q, k, v = (part.reshape(len(part), -1, op.head_size) for part in (q, k, v))
        if op.rope is not None:
            positions = batch.positions_T.long()
            cos, sin = (table[positions].unsqueeze(1) for table in (op.rope.cos, op.rope.sin))
            q, k = (_rotate(part, cos, sin, op.rope.rotary_dim) for part in (q, k))
        scales = (None, None)
        if op.kv_scales is not None:
            scales = (op.kv_scales.key_K[:, None], op.kv_scales.value_K[:, None])
        change = op.key_change
        if change is not None and format_of(layer, "key").is_quantized:
            k = k - change.shift_KD
            if change.factor_KD is not None:
                k = k / change.factor_KD
                q = q * change.factor_KD.repeat_interleave(op.num_heads // op.num_kv_heads, 0)
        is_balanced = change is not None and change.factor_KD is not None
        for name, part, scale in zip(("key", "value"), (k, v), scales, strict=True):
            slots = batch.slot_mapping_T
            write_vectors(layer, name, slots, part, scale, is_balanced=is_balanced)
        return mixed_as(layer, "key", q, is_balanced=is_balanced).contiguous()

    def _qk_norm(self, x_TN: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
        if not norm.per_head:
            return self.rms_norm(x_TN, weight, norm.eps)
        heads = x_TN.reshape(len(x_TN), -1, len(weight))
        return self.rms_norm(heads, weight, norm.eps).flatten(1)

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        starts = batch.query_starts.long()
        query_lens = starts[1:] - starts[:-1]
        # Sequences with one query (decode) share the tiles of a padded gather.
        single = torch.nonzero(query_lens == 1).squeeze(1)
        if len(single):
            rows = starts[:-1][single].unsqueeze(1)
            out_THD[rows] = _attend(q_THD[rows], rows, single, op, layer, batch)
        for sequence in torch.nonzero(query_lens > 1).squeeze(1).tolist():
            first, end = int(starts[sequence]), int(starts[sequence + 1])
            for start in range(first, end, QUERY_TILE):
                rows = torch.arange(start, min(start + QUERY_TILE, end)).unsqueeze(0)
                which = torch.tensor([sequence])
                out_THD[rows] = _attend(q_THD[rows], rows, which, op, layer, batch)
        return mixed_as(layer, "value", out_THD).flatten(1)


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    half = rotary_dim // 2
    low, high, rest = x_THD.split([half, half, x_THD.shape[-1] - rotary_dim], dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _first_visible(visibility: Visibility, position: Tensor) -> Tensor:
    """Returns `visibility.first_visible` of every position, below 0 where a window sees all."""
    match visibility:
        case Full():
            return torch.zeros_like(position)
        case Window(size):
            return position - size + 1
        case Chunk(size):
            return position // size * size


def _attend(
    q_SQHD: Tensor,
    rows_SQ: Tensor,
    sequences_S: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
) -> Tensor:
    """Online softmax over KV tiles for equally many (Q) queries of each given sequence.

    See `Ops.attention`; the running maximum and sum are kept per query, and a sink is where they
    begin. Slots that a query must not see may hold anything (NaN too): both k and v are masked.
    """
    block_size, num_kv_heads = layer.key.shape[1:3]
    S, Q, H, D = q_SQHD.shape
    # [S, K, group * Q, D]: all queries that share a kv head are one matrix.
    q = (
        q_SQHD.view(S, Q, num_kv_heads, -1, D)
        .permute(0, 2, 3, 1, 4)
        .reshape(S, num_kv_heads, -1, D)
    )
    position = batch.positions_T.long()[rows_SQ]
    first_seen = _first_visible(op.visibility, position)
    table = batch.block_table[sequences_S].long()
    best, total = _sums_of_no_key(op, (S, num_kv_heads, H // num_kv_heads, Q))
    out = torch.zeros_like(q)
    start = max(0, int(first_seen.min())) // KV_TILE * KV_TILE
    for tile in range(start, int(position.max()) + 1, KV_TILE):
        columns = table[:, tile // block_size : -(-(tile + KV_TILE) // block_size)]
        at = tile // block_size * block_size + torch.arange(columns.shape[1] * block_size)
        seen = (at <= position.unsqueeze(-1)) & (at >= first_seen.unsqueeze(-1))
        used = seen.any(1)
        # Columns nobody sees may hold anything: read block 0 in their place.
        columns = columns.where(used.view(S, -1, block_size).any(-1), 0)
        hidden = ~used.view(S, -1, 1, 1)
        shape = (S, len(at), num_kv_heads, D)
        k = read_vectors(layer, "key", columns).view(shape)
        v = read_vectors(layer, "value", columns).view(shape)
        k = k.masked_fill_(hidden, 0).permute(0, 2, 3, 1)
        v = v.masked_fill_(hidden, 0).transpose(1, 2)
        scores = (q @ k).mul_(op.scale)
        if op.soft_cap is not None:
            scores.div_(op.soft_cap).tanh_().mul_(op.soft_cap)
        masks = seen.unsqueeze(1).unsqueeze(1).expand(-1, num_kv_heads, H // num_kv_heads, -1, -1)
        scores.masked_fill_(~masks.reshape(scores.shape), -torch.inf)
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        floor = higher.masked_fill(higher == -torch.inf, 0)
        scores.sub_(floor).exp_()
        shrink = torch.exp(best - floor)
        total = total * shrink + scores.sum(-1, keepdim=True)
        out = out * shrink + scores @ v
        best = higher
    out /= total
    return out.view(S, num_kv_heads, -1, Q, D).permute(0, 3, 1, 2, 4).reshape(S, Q, H, D)


def _sums_of_no_key(op: AttentionOp, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Returns the running maximum and sum [S, K, group * Q, 1] of queries that have met no key."""
    S, num_kv_heads, group, Q = shape
    if op.sinks_H is None:
        best = torch.full((S, num_kv_heads, group * Q, 1), -torch.inf)
        return best, torch.zeros_like(best)
    sinks = op.sinks_H.float().view(1, num_kv_heads, group, 1).expand(shape)
    best = sinks.reshape(S, num_kv_heads, group * Q, 1)
    return best, torch.ones_like(best)
