"""Norm, rotation and the cache write of latent attention, in one kernel; for few tokens the product
of queries and keys' weights runs beside them.

Called once a layer. A token's page row depends on the token alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import RopeTable
from octavo.kernels.triton.latent.heads import (
    FEW_TOKENS,
    head_arguments,
    head_product,
    head_shape,
    head_tile,
)
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import is_mixed
from octavo.kernels.triton.tiles.kv_write import mixed, store_vectors

HEADS_PER_PROGRAM = 16


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


@triton.jit
def _write_token(
    t, part, q, q_out, latent, plane, norm_weight, positions, slots, cos, sin, eps, stride_latent,
    stride_q,
    H: tl.constexpr, NOPE: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Part 0 norms and rotates a token's latent row [RANK + ROPE] into its page; part 1 + g rotates
    the last ROPE columns of HEADS queries q [T, H, NOPE + ROPE] into the last ROPE of q_out
    [T, H, OUT + ROPE], `mixed` as FORMAT wants. A slot < 0 is written nowhere."""
    HALF: tl.constexpr = ROPE // 2
    position = tl.load(positions + t).to(tl.int64)
    cos += position * HALF
    sin += position * HALF
    i = tl.arange(0, BLOCK_H)
    if part == 0:
        slot = tl.load(slots + t).to(tl.int64)
        row = latent + t * stride_latent
        d = tl.arange(0, BLOCK_R)
        x = tl.load(row + d, mask=d < RANK, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps)
        x = x * tl.load(norm_weight + d, mask=d < RANK, other=0.0).to(tl.float32)
        one = tl.arange(0, 1)
        a, b = rotated_pairs(row + RANK, 0, one, one == 0, cos, sin, HALF, PAIRS, BLOCK_H)
        if FORMAT == "numbers":
            pages, _, stride_block, _, _ = plane
            to = pages + (slot // P) * stride_block + (slot % P) * (RANK + ROPE)
            tl.store(to + d, x.to(pages.dtype.element_ty), mask=(d < RANK) & (slot >= 0))
            mask = (i < HALF)[None, :] & (slot >= 0)
            at = to + RANK + i[None, :]
            tl.store(at, a.to(pages.dtype.element_ty), mask=mask)
            tl.store(at + HALF, b.to(pages.dtype.element_ty), mask=mask)
        else:
            _store_part(plane, slot, one, x[None, :], 0, RANK, RANK + ROPE, P, FORMAT)
            _store_part(plane, slot, one, _whole(a, b), RANK, ROPE, RANK + ROPE, P, FORMAT)
    else:
        heads = (part - 1) * HEADS + tl.arange(0, HEADS)
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


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_products"])
def _latent_write_kernel(
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
    num_products,
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
    PARTS: tl.constexpr,
    ABSORBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs from num_products on write tokens, PARTS each (`_write_token`). ABSORBS: those
    before multiply unrotated queries and weights into the first OUT columns of q_out
    (`head_tile`)."""
    program = tl.program_id(0) - num_products
    if ABSORBS and program < 0:
        strides = (stride_x, stride_xh, stride_w, stride_wk, stride_wn, stride_out, stride_oh)
        operands = (x, weight, out, num_tokens, strides)
        head_tile(operands, tl.program_id(0), NOPE, OUT, BLOCK_T, BLOCK_N, BLOCK_K, True, OVERLAP)
    else:
        wait_turn(OVERLAP)
        announce(OVERLAP)
        plane = (pages, scales, stride_block, stride_scales, 0)
        _write_token(
            *((program // PARTS).to(tl.int64), program % PARTS, q, q_out, latent, plane),
            *(norm_weight, positions, slots, cos, sin, eps, stride_latent, stride_x),
            *(H, NOPE, FORMAT, RANK, ROPE, P, PAIRS, OUT, BLOCK_R, BLOCK_H, HEADS),
        )


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
    keys_HNR: Tensor,
    *,
    num_absorbed: int,
    is_interleaved: bool,
    is_invariant: bool = False,
) -> None:
    """Writes normed latent vectors and rotated columns to the pages, and rotated queries to the
    last columns of `q_out` [T, H, any + rotated columns]; of the first `num_absorbed` tokens the
    product of unrotated queries and `keys` [H, unrotated, any] to its first ones, as
    `head_product` makes it.

    q [T, H, unrotated + rotated], latent [T, rank + rotated]: rows may be apart. `is_interleaved`:
    columns 2 i and 2 i + 1 turn together, else i and half the rotated columns on; what is written
    has the second form, for queries and keys alike.
    """
    num_tokens, num_heads, columns = q_THD.shape
    rope_size = plane.rope_size
    nope, rank = columns - rope_size, q_out_THC.shape[2] - rope_size
    assert q_THD.stride()[1:] == (columns, 1)
    assert q_out_THC.is_contiguous()
    assert latent_TC.stride(1) == 1
    assert rope.cos.shape[1] == rope_size // 2, (rope.cos.shape, rope_size)
    if num_tokens == 0:
        return
    heads = min(HEADS_PER_PROGRAM, next_power_of_2(num_heads))
    parts = 1 + cdiv(num_heads, heads)
    absorbs = num_absorbed == num_tokens <= FEW_TOKENS
    shape = head_shape(num_tokens, nope, rank, q_THD.element_size(), is_invariant=is_invariant)
    products, of_product = 0, (q_THD, q_THD, q_out_THC, num_tokens, q_THD.stride(0), *[0] * 6)
    if absorbs:
        products = num_heads * cdiv(rank, shape.block_n) * cdiv(num_tokens, shape.block_t)
        of_product = head_arguments(q_THD[..., :nope], keys_HNR, q_out_THC[..., :rank])
    _latent_write_kernel[(products + num_tokens * parts,)](
        *(*of_product, products),
        *(q_THD, q_out_THC, latent_TC, *plane.arguments, norm_R, positions_T, slots_T),
        *(rope.cos, rope.sin, eps, latent_TC.stride(0)),
        H=num_heads,
        NOPE=nope,
        **plane.constants,
        PAIRS=is_interleaved,
        OUT=rank,
        BLOCK_R=next_power_of_2(plane.rank),
        BLOCK_H=next_power_of_2(max(2, rope_size // 2)),
        HEADS=heads,
        PARTS=parts,
        ABSORBS=absorbs,
        BLOCK_T=shape.block_t,
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        num_warps=4,
        **launch_options(q_THD.device),
    )
    if not absorbs:
        some = slice(0, num_absorbed)
        unrotated_THN, into_THR = q_THD[some, :, :nope], q_out_THC[some, :, :rank]
        head_product(unrotated_THN, keys_HNR, into_THR, is_invariant=is_invariant)
