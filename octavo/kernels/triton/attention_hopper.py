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
from octavo.kernels.triton.attention_decode import LOG2_E, check_query
from octavo.kernels.triton.launch import cdiv, launchable
from octavo.kernels.triton.overlap import is_hopper

ROWS = 64
"""Queries of one consumer, which is one warpgroup; a program has two."""
BLOCK_N = 128
STAGES = 2
HALF = 64
"""Columns of the 128-byte rows that TMA swizzles and that wgmma reads."""
ROW_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
PAGE_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


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
def _work(
    turn, query_starts, seq_lens, num_sequences, num_tiles,
    H: gl.constexpr, SHORT: gl.constexpr, QUERIES: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Returns (head, sequence, first row, queries, first query, length, KV tiles) of what this
    program does `turn`-th; no KV tiles: nothing.

    Pieces count from the last (the longest) queries to the first, heads of one kv head together.
    Programs take them in turn, every other time in reverse, so that all have as much to do.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = place + turn % 2 * (programs - 1 - 2 * place)
    index = turn * programs + place
    tile = gl.maximum(num_tiles - 1 - index // H, 0)
    sequence = _find(query_starts, num_sequences, tile, QUERIES)
    row = gl.load(query_starts + sequence)
    num_queries = gl.load(query_starts + sequence + 1) - row
    length = gl.load(seq_lens + sequence)
    first = (tile - (row // QUERIES + sequence)) * QUERIES
    tiles = gl.cdiv(length - num_queries + gl.minimum(first + QUERIES, num_queries), N)
    if (first >= num_queries) | (num_queries <= SHORT) | (index >= H * num_tiles):
        tiles = tiles * 0
    return index % H, sequence, row, num_queries, first, length, tiles


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
def _produce(
    H: gl.constexpr, GROUP: gl.constexpr, SHORT: gl.constexpr, block_table, stride_table,
    queries, key, value, turns, query_starts, seq_lens, num_sequences, num_tiles,
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
):  # fmt: skip
    """Brings queries, and keeps the rings of keys and values full."""
    M: gl.constexpr = q.shape[1]
    D: gl.constexpr = q.shape[2]
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    done = turns * 0
    base = turns * 0
    for turn in range(turns):
        head, sequence, row, _, first, length, tiles = _work(
            turn, query_starts, seq_lens, num_sequences, num_tiles, H, SHORT, 2 * M, N
        )
        if tiles > 0:
            mbarrier.wait(q_empty, done & 1 ^ 1)
            mbarrier.expect(q_full, 2 * M * D * 2)
            for i in gl.static_range(2):
                at = row + first + i * M
                tma.async_copy_global_to_shared(queries, [at, head * D], q_full, q.index(i))
            done += 1
        table_row = block_table + sequence.to(gl.int64) * stride_table
        column = head // GROUP * D
        for tile in range(tiles):
            stage = (base + tile) % S
            phase = (base + tile) // S & 1 ^ 1
            pages = _pages(table_row, tile, length, N, key.block_shape[1])
            mbarrier.wait(k_empty.index(stage), phase)
            _load_tile(pages, key, column, k, stage, k_full)
            mbarrier.wait(v_empty.index(stage), phase)
            _load_tile(pages, value, column, v, stage, v_full)
        base += tiles


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
    acc, p, m, total, shrink, q, position, tile, tiles, base, scale_log2,
    k, v, k_full, k_empty, v_full, v_empty, MASKED: gl.constexpr,
):  # fmt: skip
    """Issues q k^T of `tile` and p v of the tile before, and takes the softmax of the former while
    the latter runs. `base`: KV tiles before this piece."""
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    s_layout: gl.constexpr = m.type.layout.parent
    acc_layout: gl.constexpr = acc.type.layout
    now = base + tile
    stage = now % S
    before = (now - 1) % S
    s = gl.zeros([m.shape[0], N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (now - 1) // S & 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    x, m, total, shrink = _softmax(s, m, total, position, tile * N, scale_log2, MASKED)
    # A branch, and `total`: else the compiler waits for p v before it takes the exponentials.
    mbarrier.wait(k_full.index((now + 1) % S), (now + 1) // S & 1, pred=tile + 1 < tiles)
    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
    mbarrier.arrive(v_empty.index(before))
    return acc, gl.convert_layout(x.to(p.dtype), p.type.layout), m, total, shrink


@gluon.jit
def _attend(
    q, k, v, k_full, k_empty, v_full, v_empty, q_empty, base,
    first, num_queries, length, tiles, scale_log2, P: gl.constexpr,
):  # fmt: skip
    """Returns softmax(scale q k^T) v of the sequence's queries from `first` on."""
    M: gl.constexpr = q.shape[0]
    D: gl.constexpr = q.shape[1]
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    position = length - num_queries + gl.minimum(first + gl.arange(0, M, rows), num_queries - 1)
    m = gl.full([M], -float("inf"), gl.float32, rows)
    total = gl.zeros([M], gl.float32, rows)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    mbarrier.wait(k_full.index(base % S), base // S & 1)
    s = gl.zeros([M, N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(base % S).permute((1, 0)), s, use_acc=False)
    mbarrier.arrive(k_empty.index(base % S))
    x, m, total, shrink = _softmax(s, m, total, position, 0, scale_log2, True)
    p = gl.convert_layout(x.to(q.dtype), p_layout)
    mbarrier.wait(k_full.index((base + 1) % S), (base + 1) // S & 1, pred=tiles > 1)
    whole = gl.maximum(gl.minimum((length - num_queries + first + 1) // N, tiles), 1)
    for tile in range(1, whole):
        acc, p, m, total, shrink = _advance(
            acc, p, m, total, shrink, q, position, tile, tiles, base, scale_log2, k, v, k_full,
            k_empty, v_full, v_empty, False,
        )  # fmt: skip
    for tile in range(whole, tiles):
        acc, p, m, total, shrink = _advance(
            acc, p, m, total, shrink, q, position, tile, tiles, base, scale_log2, k, v, k_full,
            k_empty, v_full, v_empty, True,
        )  # fmt: skip
    mbarrier.arrive(q_empty)
    last = base + tiles - 1
    mbarrier.wait(v_full.index(last % S), last // S & 1)
    if (length < tiles * N) & (length % P > 0):
        _zero_tail(v, last % S, length, P)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(last % S), acc)
    mbarrier.arrive(v_empty.index(last % S))
    return acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))[:, None]


@gluon.jit
def _consume(
    INDEX: gl.constexpr, H: gl.constexpr, SHORT: gl.constexpr, P: gl.constexpr,
    out, scale_log2,
    turns, query_starts, seq_lens, num_sequences, num_tiles,
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
):  # fmt: skip
    """Attends half of each piece's queries: the INDEX-th so many rows."""
    M: gl.constexpr = q.shape[1]
    D: gl.constexpr = q.shape[2]
    N: gl.constexpr = k.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    done = turns * 0
    base = turns * 0
    for turn in range(turns):
        head, _, row, num_queries, first, length, tiles = _work(
            turn, query_starts, seq_lens, num_sequences, num_tiles, H, SHORT, 2 * M, N
        )
        if tiles > 0:
            first = first + INDEX * M
            mbarrier.wait(q_full, done & 1)
            mean = _attend(
                q.index(INDEX), k, v, k_full, k_empty, v_full, v_empty, q_empty,
                base, first, num_queries, length, tiles, scale_log2, P,
            )  # fmt: skip
            query = first + gl.arange(0, M, gl.SliceLayout(1, wide))
            at = (row + query).to(gl.int64)[:, None] * (H * D) + head * D
            to = out + at + gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
            mean = gl.convert_layout(mean.to(q.dtype), wide)
            gl.store(to, mean, mask=(query < num_queries)[:, None])
            done += 1
        base += tiles


@launchable
@gluon.jit(do_not_specialize=["num_sequences", "num_tiles", "stride_table"])
def _hopper_kernel(
    queries,
    key,
    value,
    out,
    query_starts,
    seq_lens,
    block_table,
    num_sequences,
    num_tiles,
    stride_table,
    scale_log2,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SHORT: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out = softmax(scale q k^T + causal mask) v by pieces of one head and 2 * ROWS queries.

    queries [T, H * D]; key, value [B, P, K * D]; out [T, H, D]. A sequence's tiles of queries lie
    among num_tiles as in _prefill_kernel. One warp loads; two warpgroups attend ROWS queries each.
    """
    P: gl.constexpr = key.block_shape[1]
    dtype: gl.constexpr = key.dtype
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    turns = gl.cdiv(H * num_tiles, gl.num_programs(0))
    common = (turns, query_starts, seq_lens, num_sequences, num_tiles,
              q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty)  # fmt: skip
    result = (out, scale_log2) + common  # noqa: RUF005 (Gluon has no stars)
    source = (block_table, stride_table, queries, key, value) + common  # noqa: RUF005
    gl.warp_specialize(
        [
            (_consume, (0, H, SHORT, P) + result),  # noqa: RUF005
            (_consume, (1, H, SHORT, P) + result),  # noqa: RUF005
            (_produce, (H, GROUP, SHORT) + source),  # noqa: RUF005
        ],
        [4, 1],
        [232, 40],
    )


@lru_cache
def _has_wgmma(device: torch.device) -> bool:
    """Whether `device` is Hopper itself: its successors have other products."""
    return is_hopper(device) and triton.runtime.driver.active.get_current_target().arch == 90


@lru_cache
def _num_processors(device: torch.device) -> int:
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(device.index or 0)["multiprocessor_count"]


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


def hopper_attention(
    q_THD: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    out: Tensor,
    short: int,
) -> None:
    """Writes the rows of `out` [T, H * D] whose sequences have more than `short` queries."""
    check_query(q_THD, layer, batch)
    num_tokens, num_heads, head_size = q_THD.shape
    block_size, num_kv_heads = layer.key.shape[1:3]
    num_sequences = len(batch.seq_lens_S)
    page = [1, block_size, HALF]
    num_tiles = cdiv(num_tokens, 2 * ROWS) + num_sequences - 1
    pieces = num_heads * num_tiles
    _hopper_kernel[(min(pieces, _num_processors(q_THD.device)),)](
        TensorDescriptor.from_tensor(q_THD.flatten(1), [ROWS, head_size], ROW_LAYOUT),
        TensorDescriptor.from_tensor(layer.key.flatten(2), page, PAGE_LAYOUT),
        TensorDescriptor.from_tensor(layer.value.flatten(2), page, PAGE_LAYOUT),
        out,
        batch.query_starts,
        batch.seq_lens_S,
        batch.block_table,
        num_sequences,
        num_tiles,
        batch.block_table.stride(0),
        scale * LOG2_E,
        H=num_heads,
        GROUP=num_heads // num_kv_heads,
        D=head_size,
        SHORT=short,
        ROWS=ROWS,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        num_warps=4,
    )
