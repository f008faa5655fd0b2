"""Norm, rotation and the cache write of latent attention, in one kernel; and the heads' products.

Called once a layer. A token's page row depends on the token alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import RopeTable
from octavo.kernels.triton.latent.pages import block_stride
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn

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


@launchable
@triton.jit
def _latent_write_kernel(
    q,
    q_out,
    latent,
    pages,
    norm_weight,
    positions,
    slots,
    cos,
    sin,
    eps,
    stride_block,
    stride_latent,
    stride_q,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (t, 0) norms and rotates a token's latent row [RANK + ROPE] into its page; program
    (t, 1 + g) rotates the last ROPE columns of HEADS queries q [T, H, NOPE + ROPE] into the last
    ROPE of q_out [T, H, OUT + ROPE]. A slot < 0 is written nowhere."""
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
        to = pages + (slot // P) * stride_block + (slot % P) * (RANK + ROPE)
        d = tl.arange(0, BLOCK_R)
        x = tl.load(row + d, mask=d < RANK, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps)
        x = x * tl.load(norm_weight + d, mask=d < RANK, other=0.0).to(tl.float32)
        tl.store(to + d, x.to(pages.dtype.element_ty), mask=(d < RANK) & (slot >= 0))
        one = tl.arange(0, 1)
        a, b = rotated_pairs(row + RANK, 0, one, one == 0, cos, sin, HALF, PAIRS, BLOCK_H)
        mask = (i < HALF)[None, :] & (slot >= 0)
        at = to + RANK + i[None, :]
        tl.store(at, a.to(pages.dtype.element_ty), mask=mask)
        tl.store(at + HALF, b.to(pages.dtype.element_ty), mask=mask)
    else:
        heads = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        query = q + t * stride_q + NOPE
        a_q, b_q = rotated_pairs(
            query, NOPE + ROPE, heads, heads < H, cos, sin, HALF, PAIRS, BLOCK_H
        )
        q_mask = (heads < H)[:, None] & (i < HALF)[None, :]
        q_at = q_out + (t * H + heads[:, None]) * (OUT + ROPE) + OUT + i[None, :]
        tl.store(q_at, a_q.to(q_out.dtype.element_ty), mask=q_mask)
        tl.store(q_at + HALF, b_q.to(q_out.dtype.element_ty), mask=q_mask)


def write_latents(
    q_THD: Tensor,
    latent_TC: Tensor,
    pages_BPC: Tensor,
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
    rank, rope_size = len(norm_R), pages_BPC.shape[2] - len(norm_R)
    assert q_THD.stride()[1:] == (q_THD.shape[2], 1)
    assert q_out_THC.is_contiguous()
    assert latent_TC.stride(1) == 1
    assert rope.cos.shape[1] == rope_size // 2, (rope.cos.shape, rope_size)
    if num_tokens == 0:
        return
    heads = min(HEADS_PER_PROGRAM, next_power_of_2(num_heads))
    _latent_write_kernel[(num_tokens, 1 + cdiv(num_heads, heads))](
        *(q_THD, q_out_THC, latent_TC, pages_BPC, norm_R, positions_T, slots_T),
        *(rope.cos, rope.sin, eps, block_stride(pages_BPC)),
        *(latent_TC.stride(0), q_THD.stride(0)),
        H=num_heads,
        NOPE=q_THD.shape[2] - rope_size,
        RANK=rank,
        ROPE=rope_size,
        P=pages_BPC.shape[1],
        PAIRS=is_interleaved,
        OUT=q_out_THC.shape[2] - rope_size,
        BLOCK_R=next_power_of_2(rank),
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
