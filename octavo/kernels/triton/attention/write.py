"""QK-norm, rotary embedding and the KV write of one step, in one kernel.

Called by the Triton back end once a layer; reads the packed projection, writes the paged cache.
Never looks at other tokens: row t depends on row t alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.planes import NUMBERS, KVPlanes, planes_of
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import both_planes, is_mixed, mixes_keys
from octavo.kernels.triton.tiles.kv_write import mixed, store_vectors

WARP_NUMBERS = 512
"""Of the vectors of a program: 16 for each thread, of which it loads 8 at once."""


@triton.jit
def rotated_heads(
    row,
    heads,
    is_head,
    weight_D,
    position,
    cos,
    sin,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns [HEADS, BLOCK_D]: some heads, all of them queries or keys, of the qkv at `row`, as
    `_rope_and_cache_kernel` norms (each head alone) and rotates them."""
    d = tl.arange(0, BLOCK_D)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    here = is_head[:, None] & (d < D)[None, :]
    x = tl.load(row + heads[:, None] * D + d[None, :], mask=here, other=0.0).to(tl.float32)
    y = tl.load(row + heads[:, None] * D + partner[None, :], mask=here, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * scale * tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        y = y * scale * tl.load(weight_D + partner, mask=d < D, other=0.0).to(tl.float32)[None, :]
    angle = position * HALF + tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=d < 2 * HALF, other=1.0)
    s = tl.load(sin + angle, mask=d < 2 * HALF, other=0.0)
    return x * c[None, :] + y * tl.where(d < HALF, -s, s)[None, :]


@triton.jit
def rope_of_kv_head(
    row,
    kv_head,
    position,
    slot,
    keys,
    values,
    cos,
    sin,
    query_weight,
    key_weight,
    eps,
    given_key,
    given_value,
    key_shift,
    key_factor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns the queries [BLOCK_M, BLOCK_D] of one kv head, `mixed` as keys are; its k and v go to
    `slot`, unless it is negative: this program's threads can load them then."""
    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = rotated_heads(
        *(row, kv_head * (H // K) + rows, rows < H // K, query_weight, position, cos, sin, eps),
        *(D, HALF, HAS_NORM, BLOCK_D),
    )
    if slot >= 0:
        one = tl.arange(0, 1)
        k = rotated_heads(
            *(row, H + kv_head + one, one == 0, key_weight, position, cos, sin, eps),
            *(D, HALF, HAS_NORM, BLOCK_D),
        )
        if HAS_SHIFT:
            k -= tl.load(key_shift + kv_head * D + d, mask=d < D, other=0.0)[None, :]
        if HAS_FACTOR:
            factor = tl.load(key_factor + kv_head * D + d, mask=d < D, other=1.0)[None, :]
            k = tl.div_rn(k, tl.broadcast_to(factor, k.shape))
        at = row + (H + K + kv_head + one)[:, None] * D + d[None, :]
        v = tl.load(at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
        here = (slot, kv_head + one, one == 0)
        k = mixed(k, D, mixes_keys(KEY, HAS_FACTOR))
        store_heads(keys, *here, k, given_key, K, D, P, KEY, HAS_GIVEN)
        store_heads(
            values, *here, mixed(v, D, is_mixed(VALUE)), given_value, K, D, P, VALUE, HAS_GIVEN
        )
    tl.debug_barrier()
    if HAS_FACTOR:
        q *= tl.load(key_factor + kv_head * D + d, mask=d < D, other=1.0)[None, :]
    return mixed(q, D, mixes_keys(KEY, HAS_FACTOR)).to(row.dtype.element_ty)


@triton.jit
def store_heads(
    plane, slot, heads, mask, x, given, K: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    FORMAT: tl.constexpr, HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    """Stores x [R, BLOCK_D] float32, `mixed`, as what `heads` [R] of the token at `slot` keep (one
    for all, or [R]); `given` [K] are scales of its heads, with HAS_GIVEN."""
    numbers, scales, stride, stride_scales, _ = plane
    page, inside = (slot // P).to(tl.int64), slot % P
    WIDTH: tl.constexpr = D // 2 if FORMAT == "int4" else D
    SCALES: tl.constexpr = D // 32 if FORMAT == "int4" else 1
    row = page * stride + inside * (K * WIDTH) + heads * WIDTH
    scale_row = page * stride_scales + (inside * K + heads) * SCALES
    scale = tl.zeros(heads.shape, tl.float32)
    if HAS_GIVEN:
        scale = tl.load(given + heads, mask=mask, other=1.0)
    store_vectors(numbers, row, scales, scale_row, x, mask, scale, D, FORMAT, HAS_GIVEN)


@triton.jit
def _normed(x, scale, weight, columns, NORM: tl.constexpr):
    """Returns x [R, N], some columns of vectors, times `scale` [R] and their weights: those at
    `weight` [R], NORM 1 the same for all."""
    if NORM == 1:
        w = tl.load(weight + columns).to(tl.float32)[None, :]
        x = x * scale[:, None] * w
    elif NORM == 2:
        w = tl.load(weight[:, None] + columns[None, :]).to(tl.float32)
        x = x * scale[:, None] * w
    return x


@triton.jit
def _rotated_rows(
    at, live, position, cos, sin, weight, scale, eps, D: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns [R, BLOCK_D] float32: queries or keys at `at` [R] where `live`, of `position` [R],
    as `_rope_and_cache_kernel` norms and rotates them. NORM 2: by `scale` [R] of their tokens."""
    R: tl.constexpr = at.shape[0]
    if 2 * HALF == BLOCK_D:
        d = tl.arange(0, HALF)
        low = tl.load(at[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        high = tl.load(at[:, None] + (HALF + d)[None, :], mask=live[:, None], other=0.0)
        high = high.to(tl.float32)
        if NORM == 1:
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / D + eps)
        low = _normed(low, scale, weight, d, NORM)
        high = _normed(high, scale, weight, HALF + d, NORM)
        angle = (position * HALF)[:, None] + d[None, :]
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        x = tl.join(low * c + high * -s, high * c + low * s).permute(0, 2, 1).reshape(R, BLOCK_D)
    else:
        d = tl.arange(0, BLOCK_D)
        here = live[:, None] & (d < D)[None, :]
        x = tl.load(at[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
        if NORM == 1:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        x = _normed(x, scale, weight, tl.minimum(d, D - 1), NORM)
        if HALF > 0:
            partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
            y = tl.load(at[:, None] + partner[None, :], mask=here, other=0.0).to(tl.float32)
            y = _normed(y, scale, weight, tl.minimum(partner, D - 1), NORM)
            turned = (d < 2 * HALF)[None, :] & live[:, None]
            angle = (position * HALF)[:, None] + tl.where(d < HALF, d, d - HALF)[None, :]
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            x = x * c + y * tl.where((d < HALF)[None, :], -s, s)
    return x


@triton.jit
def _scale_of_token(token, first, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns rsqrt(mean(x^2) + eps) of SIZE elements of a token from `first` on."""
    i = tl.arange(0, BLOCK)
    x = tl.load(token + first + i, mask=i < SIZE, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def _rope_and_cache_kernel(
    qkv,
    q_out,
    key,
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    positions,
    slots,
    cos,
    sin,
    query_weight,
    key_weight,
    eps,
    given_key,
    given_value,
    key_shift,
    key_factor,
    num_tokens,
    H: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """TOKENS tokens from those of `program 0` on, HEADS of their H + 2 K heads, all of one kind:

        x'      = x * rsqrt(mean(x^2) + eps) * w          (NORM 0: x' = x; not for v)
        out[i]  = x'[i] cos[i] - x'[i + HALF] sin[i]               i in [0, HALF)
        out[i]  = x'[i] cos[i - HALF] + x'[i - HALF] sin[i - HALF] i in [HALF, 2 HALF)
        out[i]  = x'[i]                                            beyond

    qkv [T, (H + 2 K) D]; q_out [T, H, D]; key, value [B, P, K, D], in their formats, queries and
    keys `mixed` as that of keys wants; cos, sin [positions, HALF] float32. NORM 1: mean over a
    head, weights [D]; NORM 2: over the whole projection, weights [H D] and [K D], TOKENS 1.
    HAS_SHIFT, HAS_FACTOR: before they are mixed keys lose key_shift [K, D] float32, are divided by
    key_factor [K, D], and queries are multiplied by that. A slot < 0 is written nowhere.
    """
    wait_turn(OVERLAP)
    rows, d = tl.arange(0, TOKENS * HEADS), tl.arange(0, BLOCK_D)
    first, head = tl.program_id(0).to(tl.int64) * TOKENS, tl.program_id(1) * HEADS
    t, heads = first + rows // HEADS, head + rows % HEADS
    live = t < num_tokens
    token = qkv + first * ((H + 2 * K) * D)
    at = qkv + t * ((H + 2 * K) * D) + heads * D
    position = tl.load(positions + t, mask=live, other=0).to(tl.int64)
    if head < H:
        scale, weight = tl.zeros(rows.shape, tl.float32), query_weight
        if NORM == 2:
            scale += _scale_of_token(token, 0, eps, H * D, BLOCK_Q)
            weight = query_weight + heads * D
        q = _rotated_rows(
            *(at, live, position, cos, sin, weight, scale, eps, D, HALF, NORM, BLOCK_D)
        )
        if HAS_FACTOR:
            factor = key_factor + ((heads // (H // K)) * D)[:, None] + d[None, :]
            q *= tl.load(factor, mask=(d < D)[None, :], other=1.0)
        q = mixed(q, D, mixes_keys(KEY, HAS_FACTOR)).to(q_out.dtype.element_ty)
        to = q_out + ((t * H + heads) * D)[:, None] + d[None, :]
        tl.store(to, q, mask=live[:, None] & (d < D)[None, :])
    else:
        slot = tl.load(slots + t, mask=live, other=-1).to(tl.int64)
        keys, values = both_planes(
            *(key, key_scale, stride_key, stride_key_scale),
            *(value, value_scale, stride_value, stride_value_scale, KEY, VALUE),
        )
        if head < H + K:
            scale, weight = tl.zeros(rows.shape, tl.float32), key_weight
            if NORM == 2:
                scale += _scale_of_token(token, H * D, eps, K * D, BLOCK_K)
                weight = key_weight + (heads - H) * D
            k = _rotated_rows(
                *(at, live, position, cos, sin, weight, scale, eps, D, HALF, NORM, BLOCK_D)
            )
            if HAS_SHIFT:
                shift = key_shift + ((heads - H) * D)[:, None] + d[None, :]
                k -= tl.load(shift, mask=(d < D)[None, :], other=0.0)
            if HAS_FACTOR:
                factor = key_factor + ((heads - H) * D)[:, None] + d[None, :]
                k = tl.div_rn(k, tl.load(factor, mask=(d < D)[None, :], other=1.0))
            k = mixed(k, D, mixes_keys(KEY, HAS_FACTOR))
            store_heads(*(keys, slot, heads - H, slot >= 0, k, given_key, K, D, P, KEY, HAS_GIVEN))
        else:
            v = tl.load(at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
            v = mixed(v.to(tl.float32), D, is_mixed(VALUE))
            store_heads(
                *(values, slot, heads - H - K, slot >= 0, v, given_value),
                *(K, D, P, VALUE, HAS_GIVEN),
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantizing:
    """What a launch that writes keys and values is told of how they are quantised."""

    arguments: tuple[Tensor, ...]
    """Scales that a checkpoint brings for keys and for values, float32 [K] each, what keys lose and
    what they are divided by, float32 [K, D] each."""
    constants: dict[str, bool]


def quantizing_of(op: AttentionOp, planes: KVPlanes, unused: Tensor) -> Quantizing:
    """Returns what of `op` concerns the formats of `planes`."""
    given, change = op.kv_scales, None if planes.key_format == NUMBERS else op.key_change
    scales = (None, None) if given is None else (given.key_K, given.value_K)
    changes = (None, None) if change is None else (change.shift_KD, change.factor_KD)
    assert all(one is None or one.is_contiguous() for one in changes)
    names = zip(("HAS_GIVEN", "HAS_SHIFT", "HAS_FACTOR"), (given, *changes), strict=True)
    return Quantizing(
        arguments=tuple(unused if one is None else one for one in (*scales, *changes)),
        constants={name: one is not None for name, one in names},
    )


def rotation_arguments(op: AttentionOp, unused: Tensor) -> tuple[Tensor | float, ...]:
    """Returns cos, sin, the norms' weights and eps."""
    table, norm = op.rope, op.qk_norm
    if table is not None:
        shape = (len(table.cos), table.rotary_dim // 2)
        if not all(one.is_contiguous() and one.shape == shape for one in (table.cos, table.sin)):
            raise ValueError(f"cos and sin must be contiguous [positions, {shape[1]}]")
    tables = (unused, unused) if table is None else (table.cos, table.sin)
    weights = (unused, unused, 0.0) if norm is None else (norm.query, norm.key, norm.eps)
    return *tables, *weights


def _tokens_and_heads(op: AttentionOp, norm: int) -> tuple[int, int]:
    """Returns of how many tokens and heads a program, one warp, has vectors: the same in all steps,
    so that sums over a vector add up in one order and have the same bits."""
    vectors = max(1, WARP_NUMBERS // next_power_of_2(op.head_size))
    both = math.gcd(op.num_heads, op.num_kv_heads)
    heads = min(vectors, both & -both)
    return 1 if norm == 2 else vectors // heads, heads


def rope_and_cache(
    qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
) -> Tensor:
    """Returns q_THD (dtype of qkv, contiguous), normed, rotated and mixed as keys are; writes k and
    v to the cache.

    A token whose slot is negative (padding of a captured graph) writes nothing.
    """
    head_size, num_kv_heads = op.head_size, op.num_kv_heads
    num_heads, (num_tokens, columns) = op.num_heads, qkv_TN.shape
    total_heads = num_heads + 2 * num_kv_heads
    if columns != total_heads * head_size or not qkv_TN.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous [T, {total_heads * head_size}], got {tuple(qkv_TN.shape)}"
        )
    q_THD = torch.empty(num_tokens, num_heads, head_size, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if num_tokens == 0:
        return q_THD
    planes = planes_of(q_THD, layer, batch)
    quantizing = quantizing_of(op, planes, batch.positions_T)
    norm = 0 if op.qk_norm is None else (1 if op.qk_norm.per_head else 2)
    tokens, heads = _tokens_and_heads(op, norm)
    _rope_and_cache_kernel[(cdiv(num_tokens, tokens), total_heads // heads)](
        qkv_TN,
        q_THD,
        *planes.arguments,
        batch.positions_T,
        batch.slot_mapping_T,
        *rotation_arguments(op, batch.positions_T),
        *quantizing.arguments,
        num_tokens,
        H=num_heads,
        **planes.constants,
        HALF=0 if op.rope is None else op.rope.rotary_dim // 2,
        NORM=norm,
        **quantizing.constants,
        TOKENS=tokens,
        HEADS=heads,
        BLOCK_D=next_power_of_2(head_size),
        BLOCK_Q=next_power_of_2(num_heads * head_size),
        BLOCK_K=next_power_of_2(num_kv_heads * head_size),
        num_warps=1,
        **launch_options(qkv_TN.device),
    )
    return q_THD
