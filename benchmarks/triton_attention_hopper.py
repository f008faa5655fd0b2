"""Decides between forms of prefill attention on Hopper: checks each, then times it.

python benchmarks/triton_attention_hopper.py [check | time] [form ...]

roles: octavo/kernels/triton/attention_hopper.py, one program a piece; stay: as many programs as
processors; turns: with PINGPONG. alone: the same without roles, 8 warps that load for themselves.
plain, plain3: Triton over KV that lies gathered already (the gather is not timed; one sequence;
"... 128" read such KV too). Its warp_specialize=True crashes the compiler of Triton 3.6.
"""

from __future__ import annotations

import math
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic

import torch
import triton
import triton.language as tl
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
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_attention import (
    BLOCK,
    MODELS,
    exact,
    make_batch,
    make_layers,
    norm_error,
)

from octavo.kernels.ops import AttentionBatch, KVLayer
from octavo.kernels.triton import attention_hopper as hopper
from octavo.kernels.triton.attention import SHORT_QUERIES, prefill_attention
from octavo.kernels.triton.attention_decode import LOG2_E


@gluon.jit(do_not_specialize=["num_sequences", "stride_table"])
def _alone_kernel(
    queries, key, value, out, query_starts, seq_lens, block_table, num_sequences, stride_table,
    scale_log2, H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, SHORT: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """_hopper_kernel without roles: every load is issued by the program, a tile or two ahead."""
    M: gl.constexpr = 2 * ROWS
    N: gl.constexpr = BLOCK_N
    P: gl.constexpr = key.block_shape[1]
    dtype: gl.constexpr = key.dtype
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence = hopper._find(query_starts, num_sequences, tile, M)
    row = gl.load(query_starts + sequence)
    num_queries = gl.load(query_starts + sequence + 1) - row
    first = (tile - (row // M + sequence)) * M
    if (first >= num_queries) | (num_queries <= SHORT):
        return
    length = gl.load(seq_lens + sequence)
    tiles = gl.cdiv(length - num_queries + gl.minimum(first + M, num_queries), N)
    table = block_table + sequence.to(gl.int64) * stride_table
    column = head // GROUP * D

    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(dtype, [M, D], shared)
    k = gl.allocate_shared_memory(dtype, [STAGES, N, D], shared)
    v = gl.allocate_shared_memory(dtype, [STAGES, N, D], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(q_full, M * D * 2)
    tma.async_copy_global_to_shared(queries, [row + first, head * D], q_full, q)
    for i in gl.static_range(STAGES):
        if i < tiles:
            pages = hopper._pages(table, i, length, N, P)
            hopper._load_tile(pages, key, column, k, i, k_full)
            hopper._load_tile(pages, value, column, v, i, v_full)

    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    query = first + gl.arange(0, M, rows)
    position = length - num_queries + gl.minimum(query, num_queries - 1)
    m = gl.full([M], -float("inf"), gl.float32, rows)
    total = gl.zeros([M], gl.float32, rows)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = gl.zeros([M, N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), s, use_acc=False)
    x, m, total, shrink = hopper._softmax(s, m, total, position, 0, scale_log2, True)
    p = gl.convert_layout(x.to(dtype), p_layout)
    mbarrier.wait(k_full.index(1), 0, pred=tiles > 1)
    whole = gl.maximum(gl.minimum((length - num_queries + first + 1) // N, tiles), 1)
    for j in range(1, whole):
        acc, p, m, total, shrink = _alone_step(
            acc, p, m, total, shrink, q, position, j, tiles, scale_log2, k, v, k_full, v_full,
            table, length, column, key, value, False,
        )  # fmt: skip
    for j in range(whole, tiles):
        acc, p, m, total, shrink = _alone_step(
            acc, p, m, total, shrink, q, position, j, tiles, scale_log2, k, v, k_full, v_full,
            table, length, column, key, value, True,
        )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), (tiles - 1) // STAGES & 1)
    if (length < tiles * N) & (length % P > 0):
        hopper._zero_tail(v, last, length, P)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc = warpgroup_mma(p, v.index(last), acc)
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc_layout))
    query = first + gl.arange(0, M, gl.SliceLayout(1, acc_layout))
    at = (row + query).to(gl.int64)[:, None] * (H * D) + head * D
    to = out + at + gl.arange(0, D, gl.SliceLayout(0, acc_layout))[None, :]
    gl.store(to, (acc * inverse[:, None]).to(dtype), mask=(query < num_queries)[:, None])


@gluon.jit
def _alone_step(
    acc, p, m, total, shrink, q, position, tile, tiles, scale_log2, k, v, k_full, v_full,
    table, length, column, key, value, MASKED: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    P: gl.constexpr = key.block_shape[1]
    stage = tile % S
    before = (tile - 1) % S
    s_layout: gl.constexpr = m.type.layout.parent
    s = gl.zeros([m.shape[0], N], gl.float32, s_layout)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (tile - 1) // S & 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    gl.thread_barrier()
    if tile + S < tiles:
        hopper._load_tile(
            hopper._pages(table, tile + S, length, N, P), key, column, k, stage, k_full
        )
    x, m, total, shrink = hopper._softmax(s, m, total, position, tile * N, scale_log2, MASKED)
    mbarrier.wait(k_full.index((tile + 1) % S), (tile + 1) // S & 1, pred=tile + 1 < tiles)
    acc, p, total = warpgroup_mma_wait(0, deps=(acc, p, total))
    gl.thread_barrier()
    if tile - 1 + S < tiles:
        hopper._load_tile(
            hopper._pages(table, tile - 1 + S, length, N, P), value, column, v, before, v_full
        )
    return acc, gl.convert_layout(x.to(p.dtype), p.type.layout), m, total, shrink


@triton.jit
def _plain_kernel(
    queries, key, value, out, num_queries, length, scale_log2, H: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One sequence; key, value [length, K * D], as Triton's own compiler pipelines it."""
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    column = head // GROUP * D
    computed = length - num_queries
    end = tl.minimum(computed + first + BLOCK_M, length)
    whole = (computed + first + 1) // BLOCK_N * BLOCK_N
    q = queries.load([first, head * D])
    position = computed + first + tl.arange(0, BLOCK_M)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, whole, BLOCK_N):
        s = tl.dot(q, key.load([start, column]).T)
        higher = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - higher[:, None])
        shrink = tl.exp2(m - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), value.load([start, column]), acc * shrink[:, None])
        m = higher
    for start in tl.range(whole, end, BLOCK_N):
        s = tl.dot(q, key.load([start, column]).T)
        n = start + tl.arange(0, BLOCK_N)
        s = tl.where(n[None, :] <= position[:, None], s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - higher[:, None])
        shrink = tl.exp2(m - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), value.load([start, column]), acc * shrink[:, None])
        m = higher
    out.store([first, head * D], (acc / total[:, None]).to(q.dtype))


def alone(q: Tensor, layer: KVLayer, batch: AttentionBatch, out: Tensor) -> None:
    T, H, D = q.shape
    _, P, K, _ = layer.key.shape
    num_sequences = len(batch.seq_lens_S)
    _alone_kernel[(H, T // 128 + num_sequences)](
        hopper._describe(q.flatten(1), [128, D]),
        hopper._describe(layer.key.flatten(2), [1, P, 64]),
        hopper._describe(layer.value.flatten(2), [1, P, 64]),
        out, batch.query_starts, batch.seq_lens_S, batch.block_table, num_sequences,
        batch.block_table.stride(0), D**-0.5 * LOG2_E, H=H, GROUP=H // K, D=D, SHORT=64, ROWS=64,
        BLOCK_N=128, STAGES=2, num_warps=8,
    )  # fmt: skip


def roles(
    q: Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    out: Tensor,
    *,
    stay: bool = False,
    turns: bool = False,
) -> None:
    scale = q.shape[2] ** -0.5
    hopper.hopper_attention(q, layer, batch, scale, out, SHORT_QUERIES, pingpong=turns, stay=stay)


def before(q: Tensor, layer: KVLayer, batch: AttentionBatch, out: Tensor) -> None:
    prefill_attention(q, layer, batch, q.shape[2] ** -0.5, None, out)


def gathered(layer: KVLayer, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
    blocks = batch.block_table[0, : -(-int(batch.seq_lens_S[0]) // BLOCK)].long()
    return layer.key[blocks].flatten(2).flatten(0, 1), layer.value[blocks].flatten(2).flatten(0, 1)


def wide(layer: KVLayer, batch: AttentionBatch) -> tuple[KVLayer, AttentionBatch]:
    """The same KV in pages of 128: what gathering it first would allow."""
    key, value = (torch.cat((x, x[:128])) for x in gathered(layer, batch))
    n = len(key) // 128
    shape = (n, 128, *layer.key.shape[2:])
    table = torch.arange(n, dtype=torch.int32, device="cuda").unsqueeze(0)
    pages = KVLayer(key=key[: n * 128].view(shape), value=value[: n * 128].view(shape))
    return pages, replace(batch, block_table=table)


def plain(
    q: Tensor, layer: KVLayer, batch: AttentionBatch, out: Tensor, stages: int
) -> Callable[[], object]:
    T, H, D = q.shape
    key, value = gathered(layer, batch)
    describe = lambda x, rows: TensorDescriptor.from_tensor(x, [rows, D])
    arguments = (describe(q.flatten(1), 128), describe(key, 128), describe(value, 128),
                 describe(out.flatten(1), 128), T, len(key), D**-0.5 * LOG2_E)  # fmt: skip
    return lambda: _plain_kernel[(H, -(-T // 128))](
        *arguments, H=H, GROUP=H // layer.key.shape[2], D=D, BLOCK_M=128, BLOCK_N=128,
        num_warps=8, num_stages=stages,
    )  # fmt: skip


VARIANTS = {
    "before": before,
    "roles": roles,
    "stay": partial(roles, stay=True),
    "turns": partial(roles, turns=True),
    "stay turns": partial(roles, stay=True, turns=True),
    "alone": alone,
}
CHECK_SECONDS = 150
PLAIN = {"plain": 2, "plain3": 3}


def part(batch: AttentionBatch, sequence: int, last: int, starts: list[int]) -> AttentionBatch:
    """The last so many queries of one sequence."""
    rows = slice(starts[sequence + 1] - last, starts[sequence + 1])
    return AttentionBatch(
        positions_T=batch.positions_T[rows],
        slot_mapping_T=batch.slot_mapping_T[rows],
        query_starts=torch.tensor([0, last], dtype=torch.int32, device="cuda"),
        seq_lens_S=batch.seq_lens_S[sequence : sequence + 1],
        block_table=batch.block_table[sequence : sequence + 1],
    )


def check_variant(run: Callable[..., None], H: int, K: int, D: int, dtype: torch.dtype) -> str:
    torch.manual_seed(H + D)
    lens = [65, 1, 128, 127, 129, 1000, 64, 5000, 4097, 300, 2048, 8]
    query_lens = [65, 1, 128, 70, 129, 1000, 64, 333, 4097, 66, 65, 8]
    blocks = sum(-(-n // BLOCK) for n in lens) + 5
    layer = make_layers(blocks, 2, K, D, dtype)[1]
    batch = make_batch(lens, query_lens, blocks)
    seen = torch.zeros(blocks * BLOCK, dtype=torch.bool, device="cuda")
    for s, n in enumerate(lens):
        at = torch.arange(n, device="cuda")
        seen[batch.block_table[s, at // BLOCK].long() * BLOCK + at % BLOCK] = True
    for pages in (layer.key, layer.value):
        pages[~seen.view(-1, BLOCK)] = math.nan
    q = torch.randn(sum(query_lens), H, D, device="cuda").to(dtype)
    expected = exact(q, layer, batch, None)
    out = torch.full_like(q, 7.0)
    run(q, layer, batch, out)
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    notes, worst = [], 0.0
    for s, n in enumerate(query_lens):
        rows = slice(starts[s], starts[s + 1])
        if n <= SHORT_QUERIES:
            if not (out[rows] == 7.0).all():
                notes.append(f"wrote rows of {n} queries")
            continue
        worst = max(worst, norm_error(out[rows].flatten(1), expected[rows]))
        for last in {n, 65, max(65, n - 1), max(65, n // 2)}:
            some = slice(starts[s + 1] - last, starts[s + 1])
            one = torch.empty_like(q[some])
            run(q[some], layer, part(batch, s, last, starts), one)
            if not torch.equal(one, out[some]):
                notes.append(f"{last} of {n} queries of {lens[s]} have other bits")
    verdict = "ok" if worst < 1e-2 and not notes else "WRONG"
    return f"{verdict} {(H, K, D)} {dtype} error {worst:.1e} {'; '.join(notes[:6])}"


def check(name: str) -> bool:
    """Few heads here; `time` compares the models' with the kernel from before."""
    bf16, f16 = torch.bfloat16, torch.float16
    cases = [(8, 1, 128, bf16), (4, 4, 128, bf16), (6, 2, 128, f16), (8, 2, 64, bf16)]
    cases += [(4, 4, 64, f16)]
    is_right = True
    for case in cases:
        try:
            line = check_variant(VARIANTS[name], *case)
        except Exception:
            line = f"FAILED {case} {traceback.format_exc(limit=-2)}"
        print(name, line, flush=True)
        is_right &= line.startswith("ok")
    return is_right


def check_all() -> list[str]:
    """Checks every form in a process of its own, as one may hang; returns those that are right."""
    command = [sys.executable, __file__, "check"]
    jobs = {
        name: subprocess.Popen(
            [*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in VARIANTS
    }
    right, end = [], monotonic() + CHECK_SECONDS
    for name, job in jobs.items():
        try:
            print(job.communicate(timeout=max(1.0, end - monotonic()))[0], flush=True)
        except subprocess.TimeoutExpired:
            job.kill()
            print(name, "HANGS or is slow:", job.communicate()[0], flush=True)
        right += [name] * (job.returncode == 0)
    return right


def time(names: list[str]) -> None:
    shapes = [(str(n), [n], [n]) for n in (32768, 8192, 2048, 512)]
    shapes += [("4096 after 28672", [32768], [4096]), ("4 x 2048", [2048] * 4, [2048] * 4)]
    for model, (H, K, D) in MODELS.items():
        for name, lens, query_lens in shapes:
            blocks = sum(lens) // BLOCK + 8
            layer = make_layers(blocks, 2, K, D, torch.bfloat16)[1]
            batch = make_batch(lens, query_lens, blocks)
            q = torch.randn(sum(query_lens), H, D, device="cuda").bfloat16()
            out, right = torch.empty_like(q), torch.empty_like(q)
            before(q, layer, batch, right)
            pairs = sum(
                f * (n - f) + f * (f + 1) / 2 for n, f in zip(lens, query_lens, strict=True)
            )
            runs = {
                n: partial(run, q, layer, batch, out) for n, run in VARIANTS.items() if n in names
            }
            if len(lens) == 1:
                pages = wide(layer, batch)
                runs |= {
                    f"{n} 128": partial(VARIANTS[n], q, *pages, out)
                    for n in ("stay", "alone")
                    if n in names
                }
                runs |= {n: plain(q, layer, batch, out, stages) for n, stages in PLAIN.items()}
            found = []
            for form, run in runs.items():
                try:
                    out.zero_()
                    run()
                    error = norm_error(out, right.double())
                    ms = do_bench(run, warmup=20, rep=100, return_mode="median")
                    speed = 4 * H * D * pairs / ms / 1e9
                    found.append(f"{form} {speed:.0f}" + (f" WRONG {error:.0e}" * (error > 1e-2)))
                except Exception as error:
                    found.append(f"{form} FAILED {str(error)[:80]!r}")
            print(f"| {model} {name} | {' | '.join(found)} |", flush=True)


def main() -> None:
    verb, names = (sys.argv[1:2] or ["all"])[0], sys.argv[2:] or list(VARIANTS)
    if verb == "check":
        sys.exit(min([check(name) for name in names]) == 0)
    print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), flush=True)
    time(check_all() if verb == "all" else names)


if __name__ == "__main__":
    main()
