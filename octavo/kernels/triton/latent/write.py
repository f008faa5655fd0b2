"""Norm, rotation and the cache write of latent attention, in one kernel; and the heads' products.

Called once a layer. A token's page row depends on the token alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import RopeTable
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import is_mixed
from octavo.kernels.triton.tiles.kv_write import mixed, store_vectors

HEADS_PER_PROGRAM = 16
FEW_TOKENS = 64
"""Up to here a product for each head is bound by its weights, and is made in one order."""


@triton.jit
def rotated_pairs(
    x, stride, heads, is_head, cos, sin,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Returns both halves [heads, BLOCK_H] of rows x + heads * stride, rotated:
    out[i] = a_i cos_i - b_i sin_i, out[HALF + i] = b_i cos_i + a_i sin_i.
    PAIRS: a_i and b_i are neighbours, else HALF apart. cos, sin: this token's."""
    i = tl.arange(0, BLOCK_H)
    mask = is_head[:, None] & (i < HALF)[None, :]
    at = x + heads[:, None] * stride
    first = 2 * i if PAIRS else i
    second = first + 1 if PAIRS else i + HALF
    a = tl.load(at + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + second[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[None, :]
    return a * c - b * s, b * c + a * s


@triton.jit
def _whole(a, b):
    """Returns [R, 2 N]: the columns of a [R, N], then those of b."""
    both = tl.join(a, b).permute(0, 2, 1)
    return both.reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _halves(x):
    """Returns the a and b that `_whole` made x of."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _store_part(
    plane, slot, one, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    P: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Stores x [1, BLOCK] float32 as the WIDTH columns from FIRST on of the token at `slot`."""
    numbers, scales, stride, stride_scales, _ = plane
    PACKED: tl.constexpr = 2 if FORMAT == "int4" else 1
    SCALES: tl.constexpr = COLUMNS // 32 if FORMAT == "int4" else 2
    NTH: tl.constexpr = FIRST // 32 if FORMAT == "int4" else (1 if FIRST > 0 else 0)
    row = (slot // P) * stride + (slot % P) * (COLUMNS // PACKED) + FIRST // PACKED + one
    scale_row = (slot // P) * stride_scales + (slot % P) * SCALES + NTH + one
    is_live = (one == 0) & (slot >= 0)
    x = mixed(x, WIDTH, is_mixed(FORMAT))
    store_vectors(
        numbers, row, scales, scale_row, x, is_live, one.to(tl.float32), WIDTH, FORMAT, False
    )


@launchable
@triton.jit
def _latent_write_kernel(
    q,
    q_out,
    latent,
    pages,
    scales,
    stride_block,
    stride_scales,
    norm_weight,
    positions,
    slots,
    cos,
    sin,
    eps,
    stride_latent,
    stride_q,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (t, 0) norms and rotates a token's latent row [RANK + ROPE] into its page; program
    (t, 1 + g) rotates the last ROPE columns of HEADS queries q [T, H, NOPE + ROPE] into the last
    ROPE of q_out [T, H, OUT + ROPE], `mixed` as FORMAT wants. A slot < 0 is written nowhere."""
    wait_turn(OVERLAP)
    HALF: tl.constexpr = ROPE // 2
    t = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + t).to(tl.int64)
    cos += position * HALF
    sin += position * HALF
    i = tl.arange(0, BLOCK_H)
    if tl.program_id(1) == 0:
        slot = tl.load(slots + t).to(tl.int64)
        row = latent + t * stride_latent
        d = tl.arange(0, BLOCK_R)
        x = tl.load(row + d, mask=d < RANK, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps)
        x = x * tl.load(norm_weight + d, mask=d < RANK, other=0.0).to(tl.float32)
        one = tl.arange(0, 1)
        a, b = rotated_pairs(row + RANK, 0, one, one == 0, cos, sin, HALF, PAIRS, BLOCK_H)
        if FORMAT == "numbers":
            to = pages + (slot // P) * stride_block + (slot % P) * (RANK + ROPE)
            tl.store(to + d, x.to(pages.dtype.element_ty), mask=(d < RANK) & (slot >= 0))
            mask = (i < HALF)[None, :] & (slot >= 0)
            at = to + RANK + i[None, :]
            tl.store(at, a.to(pages.dtype.element_ty), mask=mask)
            tl.store(at + HALF, b.to(pages.dtype.element_ty), mask=mask)
        else:
            plane = (pages, scales, stride_block, stride_scales, 0)
            _store_part(plane, slot, one, x[None, :], 0, RANK, RANK + ROPE, P, FORMAT)
            _store_part(plane, slot, one, _whole(a, b), RANK, ROPE, RANK + ROPE, P, FORMAT)
    else:
        heads = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        query = q + t * stride_q + NOPE
        a_q, b_q = rotated_pairs(
            query, NOPE + ROPE, heads, heads < H, cos, sin, HALF, PAIRS, BLOCK_H
        )
        if FORMAT == "int4":
            a_q, b_q = _halves(mixed(_whole(a_q, b_q), ROPE, is_mixed(FORMAT)))
        q_mask = (heads < H)[:, None] & (i < HALF)[None, :]
        q_at = q_out + (t * H + heads[:, None]) * (OUT + ROPE) + OUT + i[None, :]
        tl.store(q_at, a_q.to(q_out.dtype.element_ty), mask=q_mask)
        tl.store(q_at + HALF, b_q.to(q_out.dtype.element_ty), mask=q_mask)


def write_latents(
    q_THD: Tensor,
    latent_TC: Tensor,
    plane: LatentPlane,
    norm_R: Tensor,
    eps: float,
    rope: RopeTable,
    positions_T: Tensor,
    slots_T: Tensor,
    q_out_THC: Tensor,
    *,
    is_interleaved: bool,
) -> None:
    """Writes normed latent vectors and rotated columns to the pages, and rotated queries to the
    last columns of `q_out` [T, H, any + rotated columns].

    q [T, H, unrotated + rotated], latent [T, rank + rotated]: rows may be apart. `is_interleaved`:
    columns 2 i and 2 i + 1 turn together, else i and half the rotated columns on; what is written
    has the second form, for queries and keys alike.
    """
    num_tokens, num_heads, _ = q_THD.shape
    rope_size = plane.rope_size
    assert q_THD.stride()[1:] == (q_THD.shape[2], 1)
    assert q_out_THC.is_contiguous()
    assert latent_TC.stride(1) == 1
    assert rope.cos.shape[1] == rope_size // 2, (rope.cos.shape, rope_size)
    if num_tokens == 0:
        return
    heads = min(HEADS_PER_PROGRAM, next_power_of_2(num_heads))
    _latent_write_kernel[(num_tokens, 1 + cdiv(num_heads, heads))](
        *(q_THD, q_out_THC, latent_TC, *plane.arguments, norm_R, positions_T, slots_T),
        *(rope.cos, rope.sin, eps),
        *(latent_TC.stride(0), q_THD.stride(0)),
        H=num_heads,
        NOPE=q_THD.shape[2] - rope_size,
        **plane.constants,
        PAIRS=is_interleaved,
        OUT=q_out_THC.shape[2] - rope_size,
        BLOCK_R=next_power_of_2(plane.rank),
        BLOCK_H=next_power_of_2(max(2, rope_size // 2)),
        HEADS=heads,
        num_warps=4,
        **launch_options(q_THD.device),
    )


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def _head_product_kernel(
    x,
    weight,
    out,
    num_tokens,
    stride_x,
    stride_xh,
    stride_w,
    stride_wk,
    stride_wn,
    stride_out,
    stride_oh,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, h, n] = sum_k x[t, h, k] weight[h, k, n] for head `program 0`, BLOCK_N columns and
    BLOCK_T tokens; columns of x and out lie side by side."""
    wait_turn(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    here = (t < num_tokens)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_at = x + t[:, None] * stride_x + head * stride_xh + k[None, :]
        x_tile = tl.load(x_at, mask=here & (k < K)[None, :], other=0.0)
        w_at = weight + head * stride_w + k[:, None] * stride_wk + n[None, :] * stride_wn
        w_tile = tl.load(w_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile.to(x_tile.dtype), acc, input_precision="ieee")
    at = out + t[:, None] * stride_out + head * stride_oh + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here & (n < N)[None, :])


def head_product(
    x_THK: Tensor, weight_HKN: Tensor, out_THN: Tensor, *, is_invariant: bool = False
) -> None:
    """Writes x[t, h] @ weight[h] to `out`; columns of x and `out` lie side by side.

    Few tokens, and with `is_invariant` all, are added up in an order that depends on no other
    token; more go to the vendor's batched product.
    """
    num_tokens, num_heads, depth = x_THK.shape
    columns = weight_HKN.shape[2]
    if num_tokens == 0:
        return
    if num_tokens > FEW_TOKENS and not is_invariant:
        torch.bmm(x_THK.transpose(0, 1), weight_HKN, out=out_THN.transpose(0, 1))
        return
    assert x_THK.stride(2) == out_THN.stride(2) == 1
    block_n, block_t = min(64, max(16, next_power_of_2(columns))), 16
    _head_product_kernel[(num_heads, cdiv(columns, block_n), cdiv(num_tokens, block_t))](
        *(x_THK, weight_HKN, out_THN, num_tokens),
        *(x_THK.stride(0), x_THK.stride(1), *weight_HKN.stride()),
        *(out_THN.stride(0), out_THN.stride(1)),
        K=depth,
        N=columns,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=min(64, max(16, next_power_of_2(depth))),
        num_warps=4,
        num_stages=3,
        **launch_options(x_THK.device),
    )
