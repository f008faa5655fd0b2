"""QK-norm, rotary embedding and the KV write of one step, in one kernel.

Called by the Triton back end once a layer; reads the packed projection, writes the paged cache.
Never looks at other tokens: row t depends on row t alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn

HEADS_PER_PROGRAM = 8


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
    key,
    value,
    stride_block,
    cos,
    sin,
    query_weight,
    key_weight,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns the queries [BLOCK_M, BLOCK_D] of one kv head, whose k and v go to `slot`, unless it
    is negative: this program's threads can load them then."""
    rows = tl.arange(0, BLOCK_M)
    is_head = rows < H // K
    q = rotated_heads(
        *(row, kv_head * (H // K) + rows, is_head, query_weight, position, cos, sin, eps),
        *(D, HALF, HAS_NORM, BLOCK_D),
    )
    if slot >= 0:
        one, d = tl.arange(0, 1), tl.arange(0, BLOCK_D)
        k = rotated_heads(
            *(row, H + kv_head + one, one == 0, key_weight, position, cos, sin, eps),
            *(D, HALF, HAS_NORM, BLOCK_D),
        )
        v = tl.load(row + (H + K + kv_head) * D + d, mask=d < D, other=0.0)
        at = (slot // P).to(tl.int64) * stride_block + (slot % P) * (K * D) + kv_head * D + d
        tl.store(key + at[None, :], k.to(key.dtype.element_ty), mask=(d < D)[None, :])
        tl.store(value + at, v.to(value.dtype.element_ty), mask=d < D)
    tl.debug_barrier()
    return q.to(row.dtype.element_ty)


@launchable
@triton.jit
def _rope_and_cache_kernel(
    qkv,
    q_out,
    key,
    value,
    stride_block,
    positions,
    slots,
    cos,
    sin,
    query_weight,
    key_weight,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token t, BLOCK_H of its H + 2 K heads:

        x'      = x * rsqrt(mean(x^2) + eps) * w          (NORM 0: x' = x; not for v)
        out[i]  = x'[i] cos[i] - x'[i + HALF] sin[i]               i in [0, HALF)
        out[i]  = x'[i] cos[i - HALF] + x'[i - HALF] sin[i - HALF] i in [HALF, 2 HALF)
        out[i]  = x'[i]                                            beyond

    qkv [T, (H + 2 K) D]; q_out [T, H, D]; key, value [B, P, K, D] with `stride_block`; cos, sin
    [positions, HALF] float32. NORM 1: mean over a head, weights [D]; NORM 2: over the whole
    projection, weights [H D] and [K D]. A slot < 0 is written nowhere.
    """
    wait_turn(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    row = qkv + t * ((H + 2 * K) * D)
    here = (heads[:, None] < H + 2 * K) & (d[None, :] < D)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    x = tl.load(row + heads[:, None] * D + d[None, :], mask=here, other=0.0).to(tl.float32)
    y = tl.load(row + heads[:, None] * D + partner[None, :], mask=here, other=0.0).to(tl.float32)
    is_query = heads < H
    is_key = (heads >= H) & (heads < H + K)
    if NORM == 1:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    if NORM == 2:
        i = tl.arange(0, BLOCK_Q)
        whole_q = tl.load(row + i, mask=i < H * D, other=0.0).to(tl.float32)
        j = tl.arange(0, BLOCK_K)
        whole_k = tl.load(row + H * D + j, mask=j < K * D, other=0.0).to(tl.float32)
        query_scale = tl.rsqrt(tl.sum(whole_q * whole_q, axis=0) / (H * D) + eps)
        key_scale = tl.rsqrt(tl.sum(whole_k * whole_k, axis=0) / (K * D) + eps)
        scale = tl.where(is_query, query_scale, key_scale)
    if NORM > 0:
        at = tl.zeros([BLOCK_H], tl.int32)
        if NORM == 2:
            at = tl.where(is_query, heads, heads - H) * D
        of_q = is_query[:, None] & here
        of_k = is_key[:, None] & here
        here_d = at[:, None] + d[None, :]
        there_d = at[:, None] + partner[None, :]
        w = tl.load(query_weight + here_d, mask=of_q, other=1.0).to(tl.float32)
        w *= tl.load(key_weight + here_d, mask=of_k, other=1.0).to(tl.float32)
        v = tl.load(query_weight + there_d, mask=of_q, other=1.0).to(tl.float32)
        v *= tl.load(key_weight + there_d, mask=of_k, other=1.0).to(tl.float32)
        normed = (is_query | is_key)[:, None]
        x = tl.where(normed, x * scale[:, None] * w, x)
        y = tl.where(normed, y * scale[:, None] * v, y)
    position = tl.load(positions + t).to(tl.int64)
    turned = d < 2 * HALF
    angle = tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + position * HALF + angle, mask=turned, other=1.0)
    s = tl.load(sin + position * HALF + angle, mask=turned, other=0.0)
    s = tl.where(d < HALF, -s, s)
    rotated = x * c[None, :] + y * s[None, :]
    q_at = (t * H + heads[:, None]) * D + d[None, :]
    tl.store(q_out + q_at, rotated.to(q_out.dtype.element_ty), mask=is_query[:, None] & here)
    slot = tl.load(slots + t).to(tl.int64)
    written = here & (slot >= 0)
    kv_at = (slot // P) * stride_block + (slot % P) * (K * D) + d[None, :]
    k_head = (heads - H)[:, None] * D
    k_mask = is_key[:, None] & written
    tl.store(key + kv_at + k_head, rotated.to(key.dtype.element_ty), mask=k_mask)
    v_head = (heads - H - K)[:, None] * D
    v_mask = (heads >= H + K)[:, None] & written
    tl.store(value + kv_at + v_head, x.to(value.dtype.element_ty), mask=v_mask)


def kv_strides(layer: KVLayer) -> int:
    """Returns the elements between blocks, after checking that pages are [P, K, D] contiguous."""
    _, block_size, num_kv_heads, head_size = layer.key.shape
    inner = (num_kv_heads * head_size, head_size, 1)
    for name, pages in (("key", layer.key), ("value", layer.value)):
        if pages.shape != layer.key.shape or pages.stride()[1:] != inner:
            raise ValueError(
                f"{name} pages must be views [B, {block_size}, {num_kv_heads}, {head_size}] with "
                f"contiguous pages, got shape {tuple(pages.shape)}, strides {pages.stride()}"
            )
    if layer.key.stride(0) != layer.value.stride(0) or layer.key.dtype != layer.value.dtype:
        raise ValueError("keys and values must lie in one arena and have one dtype")
    return layer.key.stride(0)


def rotation_arguments(op: AttentionOp, unused: Tensor) -> tuple[Tensor | float, ...]:
    """Returns cos, sin, the norms' weights and eps."""
    table, norm = op.rope, op.qk_norm
    if table is not None:
        half = table.rotary_dim // 2
        is_contiguous = table.cos.is_contiguous() and table.sin.is_contiguous()
        if not (
            is_contiguous and table.cos.shape == table.sin.shape and table.cos.shape[1] == half
        ):
            raise ValueError(f"cos and sin must be contiguous [positions, {half}]")
    tables = (unused, unused) if table is None else (table.cos, table.sin)
    weights = (unused, unused, 0.0) if norm is None else (norm.query, norm.key, norm.eps)
    return *tables, *weights


def rope_and_cache(
    qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
) -> Tensor:
    """Returns q_THD (dtype of qkv, contiguous), normed and rotated; writes k and v to the cache.

    A token whose slot is negative (padding of a captured graph) writes nothing.
    """
    stride_block = kv_strides(layer)
    _, block_size, num_kv_heads, head_size = layer.key.shape
    num_heads, (num_tokens, columns) = op.num_heads, qkv_TN.shape
    total_heads = num_heads + 2 * num_kv_heads
    if columns != total_heads * head_size or not qkv_TN.is_contiguous():
        raise ValueError(
            f"qkv must be contiguous [T, {total_heads * head_size}], got {tuple(qkv_TN.shape)}"
        )
    q_THD = torch.empty(num_tokens, num_heads, head_size, dtype=qkv_TN.dtype, device=qkv_TN.device)
    if num_tokens == 0:
        return q_THD
    norm = 0 if op.qk_norm is None else (1 if op.qk_norm.per_head else 2)
    # Decode: a program per few heads spreads one token over the chip.
    block_h = HEADS_PER_PROGRAM
    _rope_and_cache_kernel[(num_tokens, cdiv(total_heads, block_h))](
        qkv_TN,
        q_THD,
        layer.key,
        layer.value,
        stride_block,
        batch.positions_T,
        batch.slot_mapping_T,
        *rotation_arguments(op, batch.positions_T),
        H=num_heads,
        K=num_kv_heads,
        D=head_size,
        P=block_size,
        HALF=0 if op.rope is None else op.rope.rotary_dim // 2,
        NORM=norm,
        BLOCK_H=block_h,
        BLOCK_D=next_power_of_2(head_size),
        BLOCK_Q=next_power_of_2(num_heads * head_size),
        BLOCK_K=next_power_of_2(num_kv_heads * head_size),
        num_warps=4,
        **launch_options(qkv_TN.device),
    )
    return q_THD
