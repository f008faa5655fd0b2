"""Makes keys easier to quantise, from a sample: what all keys have in common is taken off them, and
numbers that are large in keys and small in queries meet in the middle. No score changes.

Called by the runner's builder where keys are compressed, and by benchmarks, with a pass of the
decoder that is shown to `learn`. Whoever reads keys need not know of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionOp, KeyChange
from octavo.layers.attention import Attention
from octavo.layers.rope import mean_rotated, rotated
from octavo.models.decoder import Decoder

LEAST_TOKENS = 128
"""A sample of fewer says little of other texts."""
FIRST_SHARE = 0.25
"""Of the first key in what is taken off: many queries look at that token alone, so that an error of
its score hurts most."""
MAX_FACTOR = 256.0
LEAST_SQUARE = 1e-20


def with_room(decoder: Decoder, device: torch.device) -> Decoder:
    """Returns the decoder whose layers can `learn`: those of grouped-query attention, but for those
    whose scales come from the checkpoint, which know nothing of it. Until then nothing changes but
    that keys of fp8 are mixed."""
    layers = []
    for layer in decoder.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention) and mixer.op.kv_scales is None:
            layer = replace(layer, mixer=replace(mixer, op=op_with_room(mixer.op, device)))
        layers.append(layer)
    return replace(decoder, layers=tuple(layers))


def op_with_room(op: AttentionOp, device: torch.device) -> AttentionOp:
    """Returns the op with a factor of 1, and a shift."""
    if op.key_change is None:
        shift_KD = torch.zeros(op.num_kv_heads, op.head_size, device=device)
    else:
        shift_KD = op.key_change.shift_KD.clone()
    change = KeyChange(shift_KD=shift_KD, factor_KD=torch.ones_like(shift_KD))
    return replace(op, key_change=change)


def learn(op: AttentionOp, qkv_TN: Tensor) -> None:
    """Sets `op.key_change` to what suits keys like those of qkv [T, (H + 2 K) D], a text from its
    first token on, before norms and rotation of the op."""
    change = op.key_change
    if change is None or change.factor_KD is None:
        return
    q_THD, k_TKD = _normed(op, qkv_TN)
    if op.sinks_H is None and op.soft_cap is None:
        change.shift_KD.copy_(common_key(op, k_TKD))
    turned = k_TKD if op.rope is None else rotated(k_TKD, op.rope)
    keys_KD = (turned - change.shift_KD).square().mean(0)
    queries_KD = q_THD.square().mean(0).unflatten(0, (op.num_kv_heads, -1)).mean(1)
    change.factor_KD.copy_(balance(op, queries_KD, keys_KD))


def common_key(op: AttentionOp, k_TKD: Tensor) -> Tensor:
    """Returns [K, D]: what is taken off rotated keys of all texts, from those of one before their
    rotation. Their mean as if they stood at any position, and a share of the first key."""
    if op.rope is None:
        mean_KD, first_KD = k_TKD.mean(0), k_TKD[0]
    else:
        mean_KD, first_KD = mean_rotated(k_TKD.mean(0), op.rope), rotated(k_TKD[:1], op.rope)[0]
    return (1 - FIRST_SHARE) * mean_KD + FIRST_SHARE * first_KD


def balance(op: AttentionOp, queries_KD: Tensor, keys_KD: Tensor) -> Tensor:
    """Returns what queries are multiplied by and keys divided by, [K, D], from mean squares.

    Mixing spreads a key's error over all its numbers, so that a score's is |q * f| |k / f|: least
    where both are alike in each number, that is f^4 = keys / queries. The two numbers that are
    rotated together have one factor.
    """
    queries_KD, keys_KD = (_of_pairs(op, x_KD) for x_KD in (queries_KD, keys_KD))
    is_used = (queries_KD > LEAST_SQUARE) & (keys_KD > LEAST_SQUARE)
    factors_KD = torch.where(is_used, keys_KD / queries_KD, 1.0).pow(0.25)
    return factors_KD.clamp(1 / MAX_FACTOR, MAX_FACTOR)


def _of_pairs(op: AttentionOp, x_KD: Tensor) -> Tensor:
    size = 0 if op.rope is None else op.rope.rotary_dim
    pairs = x_KD[:, : size // 2] + x_KD[:, size // 2 : size]
    return torch.cat((pairs, pairs, 2 * x_KD[:, size:]), dim=1)


def _normed(op: AttentionOp, qkv_TN: Tensor) -> tuple[Tensor, Tensor]:
    sizes = [op.num_heads * op.head_size, op.num_kv_heads * op.head_size]
    q, k, _ = qkv_TN.float().split([*sizes, sizes[1]], dim=1)
    norm = op.qk_norm
    if norm is not None:
        q, k = (
            _rms_norm(part.unflatten(1, (-1, len(weight))), weight, norm.eps).flatten(1)
            for part, weight in ((q, norm.query), (k, norm.key))
        )
    q_THD, k_TKD = (part.unflatten(1, (-1, op.head_size)) for part in (q, k))
    return q_THD, k_TKD


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
