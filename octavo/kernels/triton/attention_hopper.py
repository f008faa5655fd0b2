"""Causal attention of long prompts on Hopper: pages come by TMA, products run beside the softmax.

Called by the tiles' launcher (attention.py) where `fits` says so. Never takes short sequences,
windows or 32-bit numbers, and never asks the device anything.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.ops import AttentionBatch, KVLayer
from octavo.kernels.triton.attention_decode import LOG2_E
from octavo.kernels.triton.overlap import is_hopper

ROWS = 64
"""Queries of one consumer, which is one warpgroup; a program has two."""
BLOCK_N = 128
STAGES = 2
HALF = 64
"""Columns of the 128-byte rows that TMA swizzles and that wgmma reads."""


@gluon.jit
def _find(starts, num_sequences, tile, QUERIES: gl.constexpr):
    """Returns the last s with starts[s] // QUERIES + s <= tile."""
    sequence = tile * 0
    beyond = sequence + num_sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        if gl.load(starts + middle) // QUERIES + middle <= tile:
            sequence = middle
        else:
            beyond = middle
    return sequence


@gluon.jit
def _load_tile(pages, source, column, ring, stage, full):
    """Brings a tile [BLOCK_N, D] by pages; TMA and wgmma want its halves of 64 columns apart."""
    N: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    P: gl.constexpr = source.block_shape[1]
    COLUMNS: gl.constexpr = source.block_shape[2]
    shape: gl.constexpr = [D // COLUMNS * N // P, 1, P, COLUMNS]
    to = ring.index(stage)._reinterpret(ring.dtype, shape, source.layout)
    mbarrier.expect(full.index(stage), N * D * 2)
    for half in gl.static_range(D // COLUMNS):
        for i in gl.static_range(N // P):
            tma.async_copy_global_to_shared(
                source,
                [pages[i], 0, column + half * COLUMNS],
                full.index(stage),
                to.index(half * (N // P) + i),
            )


@gluon.jit
def _pages(table_row, tile, length, N: gl.constexpr, P: gl.constexpr):
    """Returns a tile's pages. Behind the sequence's end there is -1, of which TMA makes zeros."""
    pages = ()
    for i in gl.static_range(N // P):
        at = tile * (N // P) + i
        page = gl.load(table_row + at, mask=at * P < length, other=-1)
        pages = pages + (page,)  # noqa: RUF005 (Gluon has no stars)
    return pages


@gluon.jit
def _produce(table_row, length, tiles, column, key, value, k, v, k_full, k_empty, v_full, v_empty):
    """Keeps the rings full."""
    for tile in range(tiles):
        stage = tile % k.shape[0]
        phase = tile // k.shape[0] & 1 ^ 1
        pages = _pages(table_row, tile, length, k.shape[1], key.block_shape[1])
        mbarrier.wait(k_empty.index(stage), phase)
        _load_tile(pages, key, column, k, stage, k_full)
        mbarrier.wait(v_empty.index(stage), phase)
        _load_tile(pages, value, column, v, stage, v_full)


@gluon.jit
def _zero_tail(v, stage, length, P: gl.constexpr):
    """Clears the values behind the sequence's end in its last page: 0 times NaN would be NaN.

    Both consumers do it, writing what the other may read already as the same bits.
    """
    N: gl.constexpr = v.shape[1]
    HALVES: gl.constexpr = v.shape[2] // 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    page = length % N // P
    pages = v.index(stage)._reinterpret(v.dtype, [HALVES * N // P, P, 64], v.layout)
    row = gl.arange(0, P, gl.SliceLayout(1, LAYOUT))
    for half in gl.static_range(HALVES):
        there = pages.index(half * (N // P) + page)
        values = there.load(LAYOUT)
        there.store(gl.where((row < length % P)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _softmax(s, m, total, position, start, scale_log2, MASKED: gl.constexpr):
    """Returns (p, m, total, shrink) of the running softmax after the scores s."""
    layout: gl.constexpr = s.type.layout
    if MASKED:
        n = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        s = gl.where(n[None, :] <= position[:, None], s, -float("inf"))
    higher = gl.maximum(m, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - higher[:, None])
    shrink = gl.exp2(m - higher)
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _advance(
    acc, p, m, total, shrink, q, position, tile, tiles, scale_log2,
    k, v, k_full, k_empty, v_full, v_empty, mine, other, turn,
    MASKED: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Issues q k^T of `tile` and p v of the tile before, and takes the softmax of the former while
    the latter runs."""
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    s_layout: gl.constexpr = m.type.layout.parent
    acc_layout: gl.constexpr = acc.type.layout
    stage = tile % S
    before = (tile - 1) % S
    if PINGPONG:
        mbarrier.wait(mine, turn & 1)
    s = gl.zeros([m.shape[0], N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (tile - 1) // S & 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    if PINGPONG:
        mbarrier.arrive(other)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    x, m, total, shrink = _softmax(s, m, total, position, tile * N, scale_log2, MASKED)
    # A branch, and `total`: else the compiler waits for p v before it takes the exponentials.
    mbarrier.wait(k_full.index((tile + 1) % S), (tile + 1) // S & 1, pred=tile + 1 < tiles)
    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
    mbarrier.arrive(v_empty.index(before))
    return acc, gl.convert_layout(x.to(p.dtype), p.type.layout), m, total, shrink


@gluon.jit
def _consume(
    INDEX: gl.constexpr, STRIDE: gl.constexpr, P: gl.constexpr, PINGPONG: gl.constexpr,
    q, q_full, k, v, k_full, k_empty, v_full, v_empty, turns,
    out, first, row, num_queries, length, tiles, scale_log2,
):  # fmt: skip
    """Attends ROWS queries from `first` of the sequence on; `out` is the sequence's head."""
    M: gl.constexpr = q.shape[1]
    D: gl.constexpr = q.shape[2]
    N: gl.constexpr = k.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q.index(INDEX)
    first = first + INDEX * M
    query = first + gl.arange(0, M, rows)
    position = length - num_queries + gl.minimum(query, num_queries - 1)
    m = gl.full([M], -float("inf"), gl.float32, rows)
    total = gl.zeros([M], gl.float32, rows)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    mine = turns.index(INDEX)
    other = turns.index(1 - INDEX)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = gl.zeros([M, N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), s, use_acc=False)
    mbarrier.arrive(k_empty.index(0))
    x, m, total, shrink = _softmax(s, m, total, position, 0, scale_log2, True)
    p = gl.convert_layout(x.to(q.dtype), p_layout)
    mbarrier.wait(k_full.index(1), 0, pred=tiles > 1)
    whole = gl.maximum(gl.minimum((length - num_queries + first + 1) // N, tiles), 1)
    for tile in range(1, whole):
        acc, p, m, total, shrink = _advance(
            acc, p, m, total, shrink, q, position, tile, tiles, scale_log2, k, v,
            k_full, k_empty, v_full, v_empty, mine, other, tile - 1, False, PINGPONG,
        )  # fmt: skip
    for tile in range(whole, tiles):
        acc, p, m, total, shrink = _advance(
            acc, p, m, total, shrink, q, position, tile, tiles, scale_log2, k, v,
            k_full, k_empty, v_full, v_empty, mine, other, tile - 1, True, PINGPONG,
        )  # fmt: skip
    last = (tiles - 1) % k.shape[0]
    mbarrier.wait(v_full.index(last), (tiles - 1) // k.shape[0] & 1)
    if (length < tiles * N) & (length % P > 0):
        _zero_tail(v, last, length, P)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(last), acc)
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    mean = gl.convert_layout((acc * inverse[:, None]).to(q.dtype), wide)
    query = first + gl.arange(0, M, gl.SliceLayout(1, wide))
    at = (row + query).to(gl.int64)[:, None] * STRIDE
    to = out + at + gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    gl.store(to, mean, mask=(query < num_queries)[:, None])


@gluon.jit
def _hopper_kernel(
    queries,
    key,
    value,
    out,
    query_starts,
    seq_lens,
    block_table,
    num_sequences,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SHORT: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
):
    """out = softmax(scale q k^T + causal mask) v for 2 * ROWS queries of one sequence and head.

    queries [T, H * D]; key, value [B, P, K * D]; out [T, H, D]. Program 0 is the head, so that
    heads of one kv head run together; program 1 counts tiles from the last (the longest) to the
    first, as in _prefill_kernel. One warp brings pages, two warpgroups attend ROWS queries each.
    """
    QUERIES: gl.constexpr = 2 * ROWS
    P: gl.constexpr = key.block_shape[1]
    dtype: gl.constexpr = key.dtype
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence = _find(query_starts, num_sequences, tile, QUERIES)
    row = gl.load(query_starts + sequence)
    num_queries = gl.load(query_starts + sequence + 1) - row
    first = (tile - (row // QUERIES + sequence)) * QUERIES
    if (first >= num_queries) | (num_queries <= SHORT):
        return
    length = gl.load(seq_lens + sequence)
    end = length - num_queries + gl.minimum(first + QUERIES, num_queries)
    tiles = gl.cdiv(end, BLOCK_N)
    table_row = block_table + sequence.to(gl.int64) * stride_table
    column = head // GROUP * D

    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    if PINGPONG:
        mbarrier.arrive(turns.index(0))
    mbarrier.expect(q_full, 2 * ROWS * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(
            queries, [row + first + i * ROWS, head * D], q_full, q.index(i)
        )
    common = (q, q_full, k, v, k_full, k_empty, v_full, v_empty, turns, out + head * D, first, row,
              num_queries, length, tiles, scale_log2)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (0, H * D, P, PINGPONG) + common),  # noqa: RUF005
            (_consume, (1, H * D, P, PINGPONG) + common),  # noqa: RUF005
            (_produce, (table_row, length, tiles, column, key, value, k, v, k_full, k_empty,
                        v_full, v_empty)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@lru_cache
def _has_wgmma(device: torch.device) -> bool:
    """Whether `device` is Hopper itself: its successors have other products."""
    return is_hopper(device) and triton.runtime.driver.active.get_current_target().arch == 90


def fits(q_THD: Tensor, layer: KVLayer, window: int | None) -> bool:
    """Whether `hopper_attention` can take a layer; never depends on the step, so that a row's bits
    do not."""
    pages = (layer.key, layer.value)
    return (
        window is None
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == q_THD.dtype and x.data_ptr() % 16 == 0 for x in (q_THD, *pages))
        and q_THD.shape[2] in (64, 128)
        and layer.key.shape[1] in (16, 32, 64, 128)
        and _has_wgmma(q_THD.device)
    )


def _describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout(128, 16, len(block)))


def hopper_attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    out: Tensor,
    short: int,
    *,
    pingpong: bool = False,
) -> None:
    """Writes the rows of `out` [T, H * D] whose sequences have more than `short` queries."""
    num_tokens, num_heads, head_size = q_THD.shape
    block_size, num_kv_heads = layer.key.shape[1:3]
    num_sequences = len(batch.seq_lens_S)
    page = [1, block_size, HALF]
    _hopper_kernel[(num_heads, num_tokens // (2 * ROWS) + num_sequences)](
        _describe(q_THD.flatten(1), [ROWS, head_size]),
        _describe(layer.key.flatten(2), page),
        _describe(layer.value.flatten(2), page),
        out,
        batch.query_starts,
        batch.seq_lens_S,
        batch.block_table,
        num_sequences,
        batch.block_table.stride(0),
        scale * LOG2_E,
        H=num_heads,
        GROUP=num_heads // num_kv_heads,
        D=head_size,
        SHORT=short,
        ROWS=ROWS,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        PINGPONG=pingpong,
        num_warps=4,
    )
