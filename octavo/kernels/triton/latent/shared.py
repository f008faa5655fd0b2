"""Latent attention over what decoding sequences share: each shared page is read once for all.

Absorbed: the heads of all members are rows of one product, so that a few members fill a tile. The
private tails are latent/decode.py's, which merges both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.device_plan import SharedPrefix
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.attention.splits import latent_tiling
from octavo.kernels.triton.latent.hopper.chunks import shared_prefixes
from octavo.kernels.triton.latent.hopper.tiles import fits
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.latent.tiles import (
    absorbed_shape,
    attend_latent,
    stack_of,
)
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2, num_processors
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn


@launchable
@triton.jit(do_not_specialize=["num_partials", "num_tiles"])
def _latent_shared_kernel(
    q,
    pages,
    scales,
    stride_block,
    stride_scales,
    partial_out,
    partial_lse,
    query_starts,
    block_table,
    members,
    group_starts,
    shared_tokens,
    split_sizes,
    num_partials,
    num_tiles,
    stride_table,
    scale_log2,
    H: tl.constexpr,
    STACK: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of what a group of decoding sequences shares, absorbed, for BLOCK_M // STACK of
    its members at once: as `_shared_kernel` of attention/shared.py; program 2: STACK heads."""
    MEMBERS: tl.constexpr = BLOCK_M // STACK
    wait_turn(OVERLAP)
    group = tl.program_id(1) // num_tiles
    first = tl.load(group_starts + group)
    count = tl.load(group_starts + group + 1) - first
    first_member = (tl.program_id(1) % num_tiles) * MEMBERS
    if first_member >= count:
        return
    leader = tl.load(members + first).to(tl.int64)
    shared = tl.load(shared_tokens + leader)
    size = tl.load(split_sizes + group)
    start = tl.program_id(0) * size
    if start >= shared:
        return
    end = tl.minimum(start + size, shared)
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    member = first_member + rows // STACK
    live = member < count
    sequence = tl.load(members + first + member, mask=live, other=0)
    t = tl.load(query_starts + sequence, mask=live, other=0).to(tl.int64)
    heads = t * H + tl.program_id(2) * STACK + rows % STACK
    q_at = q + heads[:, None] * (RANK + ROPE)
    mask = live[:, None] & (offs_d < RANK)[None, :]
    q_tile = tl.load(q_at + offs_d[None, :], mask=mask, other=0.0)
    mask_e = live[:, None] & (offs_e < ROPE)[None, :]
    q_rope = tl.load(q_at + RANK + offs_e[None, :], mask=mask_e, other=0.0)
    plane = (pages, scales, stride_block, stride_scales, 0)
    table_row = block_table + leader * stride_table
    middle = end // BLOCK_N * BLOCK_N  # Splits begin at multiples of BLOCK_N.
    position = rows * 0 + end
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, m, total = attend_latent(
        acc, m, total, q_tile, q_rope, position, plane, table_row, pages, pages, pages,
        start, middle, 0, 0, scale_log2, FORMAT, RANK, ROPE, RANK, RANK, P, True, False,
        BLOCK_N, BLOCK_D, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    acc, m, total = attend_latent(
        acc, m, total, q_tile, q_rope, position, plane, table_row, pages, pages, pages,
        middle, end, 0, 0, scale_log2, FORMAT, RANK, ROPE, RANK, RANK, P, True, True,
        BLOCK_N, BLOCK_D, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    owner = sequence.to(tl.int64) * H + tl.program_id(2) * STACK + rows % STACK
    place = owner * num_partials + tl.program_id(0)
    to = partial_out + place[:, None] * RANK + offs_d[None, :]
    tl.store(to, acc / total[:, None], mask=mask)
    tl.store(partial_lse + place, m + tl.log2(total), mask=live)


def shared_latents(
    q_THC: Tensor,
    plane: LatentPlane,
    batch: AttentionBatch,
    scale: float,
    plan: SharedPrefix,
    partials: Partials,
) -> None:
    """Writes to `partials` [S, H, partials, rank] what members of groups see of shared tokens."""
    if fits(q_THC, plane):
        tiles = latent_tiling(q_THC.shape[1], num_processors(q_THC.device))
        shared_prefixes(q_THC, plane, batch, scale, plan, partials, tiles)
        return
    assert q_THC.is_contiguous()
    num_heads, dtype = q_THC.shape[1], plane.dtype_with(q_THC)
    block_m, block_n, num_warps, num_stages = absorbed_shape(dtype)
    stack = stack_of(num_heads, block_m)
    num_tiles = next_power_of_2(cdiv(plan.max_members * stack, block_m))
    _latent_shared_kernel[(plan.max_splits, plan.num_groups * num_tiles, num_heads // stack)](
        q_THC.to(dtype),
        *plane.arguments,
        *(partials.out, partials.lse, batch.query_starts, batch.block_table),
        *(plan.members, plan.group_starts, plan.shared_tokens_S, plan.split_sizes),
        *(partials.num_partials, num_tiles, batch.block_table.stride(0)),
        scale * LOG2_E,
        H=num_heads,
        STACK=stack,
        **plane.constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(plane.rank)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THC.device),
    )
