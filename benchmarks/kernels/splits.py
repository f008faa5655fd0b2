"""Times attention of short chunks and shared prefixes by parts, in several numbers of splits.

python benchmarks/kernels/splits.py [chosen] [1 2 4 8 16] [--only WORD]

Shows whether what splits.py chooses is the best, and where the time goes: `attend` (splits of the
keys), `merge` (of their results; for shared prefixes with the private tails) and `all`, as graphs
of all layers, in us. `plan` is once a step, not once a layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from attention import BYTES_PER_SECOND, FLOPS_PER_SECOND, MODELS, graph_ms
from attention_cases import BLOCK, batch_of, make_layers, op_of, tiles_of

from octavo.kernels.facts import split_partials
from octavo.kernels.inputs import AttentionBatch, KVLayer
from octavo.kernels.triton.attention.choose import SHORT_QUERIES, SHORT_SPLITS, short_limits
from octavo.kernels.triton.attention.decode import decode_attention
from octavo.kernels.triton.attention.hopper import kernel as hopper
from octavo.kernels.triton.attention.partials import make_partials
from octavo.kernels.triton.attention.scores import plain_scores
from octavo.kernels.triton.attention.shared import SharedPrefixPlan, plan_shared_prefix
from octavo.kernels.triton.attention.short_chunks import (
    ShortPlan,
    merge_short_chunks,
    plan_short_chunks,
)
from octavo.kernels.triton.attention.splits import SPLIT_STEP, Tiling
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.visibility import Full

CHUNKS = [
    ("64 after 32768", [32832], 64, 0),
    ("16 after 32768", [32784], 16, 0),
    ("64 after 4096", [4160], 64, 0),
    ("8 x 64 after 4096", [4160] * 8, 64, 0),
    ("32 x 64 after 32768 shared", [32832] * 32, 64, 2048),
]
"""(name, lengths, queries of each, blocks that all share)."""
DECODES = [(32, 32768), (8, 32768), (32, 4096), (256, 32768)]
"""(sequences, shared tokens); each has 96 of its own."""


def split_tokens(longest: int, count: int) -> int:
    return -(-longest // (count * SPLIT_STEP)) * SPLIT_STEP


def forced_plan(lens: list[int], queries: int, size: int, tiles: Tiling) -> ShortPlan:
    """The table that plan_short_chunks would make, had it chosen `size`."""
    parts = np.array([-(-length // size) for length in lens])
    is_split = parts > 1
    pieces = -(-queries // tiles.queries) * parts
    sums = [pieces, queries * parts * is_split, queries * is_split]
    table = np.concatenate([*[[0, *np.cumsum(part)] for part in sums], [size]])
    there = torch.from_numpy(table.astype(np.int32)).cuda()
    return ShortPlan(table=there, limits=short_limits(len(lens) * queries))


def us(calls: Iterable[Callable[[], object]]) -> str:
    try:
        return f"{graph_ms(list(calls), repeats=7) * 1e3:.1f}"
    except Exception as error:
        return f"FAILED {str(error)[:60]!r}"


def chunks(model: str, counts: list[int | None], only: str) -> None:
    H, K, D = MODELS[model]
    tiles = tiles_of(H, K)
    for name, lens, queries, shared_blocks in CHUNKS:
        if only not in f"{model} {name}":
            continue
        num_tokens, size = len(lens) * queries, lens[0]
        tokens = size + len(lens) * queries if shared_blocks else sum(lens)
        num_blocks = tokens // BLOCK + 8 + len(lens)
        layers = make_layers(num_blocks, 3, K, D, torch.bfloat16)
        batch = batch_of(lens, [queries] * len(lens), shared_blocks, num_blocks)
        q = torch.randn(num_tokens, H, D, device="cuda").bfloat16()
        floor = chunk_floor(num_tokens, size, tokens, (H, K, D))
        plan_of = partial(plan_short_chunks, batch, tiles, Full(), short_limits(num_tokens))
        print(f"{model} {name}: floor {floor:.1f}, plan {us([plan_of] * 4)}", flush=True)
        chosen = int(plan_of().table[-1])
        for count in counts:
            split = chosen if count is None else split_tokens(size, count)
            time_chunks(q, layers, batch, forced_plan(lens, queries, split, tiles), split)


def chunk_floor(num_tokens: int, length: int, read: int, heads: tuple[int, int, int]) -> float:
    H, K, D = heads
    flops = 4 * H * D * num_tokens * (length - SHORT_QUERIES / 2)
    return 1e6 * max(flops / FLOPS_PER_SECOND, read * K * D * 4 / BYTES_PER_SECOND)


def time_chunks(
    q: torch.Tensor, layers: list[KVLayer], batch: AttentionBatch, plan: ShortPlan, split: int
) -> None:
    num_tokens, H, D = q.shape
    groups = tiles_of(H, layers[0].key.shape[2]).head_groups
    owners = len(batch.seq_lens_S)
    num_partials = max(1, int(plan.table[2 * owners + 1]))
    partials = make_partials(q[:1], num_partials)
    out = torch.empty_like(q)

    def attend(layer: KVLayer) -> None:
        hopper.short_chunks(q, op_of(q, layer), layer, batch, out, partials, plan, num_tokens)

    def merge() -> None:
        merge_short_chunks(out, plain_scores(1.0, plan.table), batch, plan, partials, num_tokens)

    def both(layer: KVLayer) -> None:
        attend(layer)
        merge()

    parts = -(-int(batch.seq_lens_S[0]) // split)
    times = [us(partial(one, layer) for layer in layers) for one in (attend, both)]
    merged = us([merge] * 4)
    megabytes = num_partials * H * D * 4 / 1e6 if parts > 1 else 0
    print(
        f"  {parts:2} splits of {split}: all {times[1]}, attend {times[0]}, merge {merged}; "
        f"{int(plan.table[owners]) * groups} pieces, {megabytes:.0f} MB of partials",
        flush=True,
    )


def decodes(model: str, counts: list[int | None], only: str) -> None:
    H, K, D = MODELS[model]
    tiles = tiles_of(H, K)
    for size, prefix in DECODES:
        name = f"{model} decode {size} x ({prefix} shared + 96)"
        if only not in name:
            continue
        blocks = prefix // BLOCK
        num_blocks = blocks + size * 6 + 8
        layers = make_layers(num_blocks, 3, K, D, torch.bfloat16)
        total = prefix + 96
        batch = batch_of([total] * size, [1] * size, blocks, num_blocks)
        table = batch.block_table.cpu().numpy()
        ones = np.ones(size, np.int64)
        plan = plan_shared_prefix(table, np.full(size, total), ones, tiles)
        assert plan is not None
        q = torch.randn(size, H, D, device="cuda").bfloat16()
        moved = (prefix + size * 96) * K * D * 4
        floor = max(moved / BYTES_PER_SECOND, 4 * H * D * size * total / FLOPS_PER_SECOND)
        print(f"{name}: floor {floor * 1e6:.1f}", flush=True)
        for count in counts:
            time_decodes(q, layers, batch, plan if count is None else resplit(plan, count, tiles))


def resplit(plan: SharedPrefixPlan, count: int, tiles: Tiling) -> SharedPrefixPlan:
    """The plan of one group, had it chosen so many splits."""
    shared = int(plan.shared_tokens.max())
    size = split_tokens(shared, count)
    parts = -(-shared // size)
    pieces = -(-len(plan.members) // tiles.queries) * parts
    return replace(
        plan,
        split_sizes=np.array([size], np.int32),
        piece_starts=np.array([0, pieces], np.int32),
        max_splits=parts,
    )


def time_decodes(
    q: torch.Tensor, layers: list[KVLayer], batch: AttentionBatch, plan: SharedPrefixPlan
) -> None:
    there = plan.to_device(q.device)
    partials = make_partials(q, plan.max_splits + split_partials(plan.max_tail))
    out, tickets = torch.empty_like(q), make_tickets(q.device)

    def attend(layer: KVLayer) -> None:
        hopper.shared_prefixes(q, op_of(q, layer), layer, batch, there, partials)

    def tails(layer: KVLayer) -> None:
        decode_attention(
            *(q, op_of(q, layer), layer, batch, out),
            max_seq_len=plan.max_tail,
            shared=(there.shared_tokens_S, there.shared_partials_S),
            partials=partials,
            tickets=tickets,
        )

    def both(layer: KVLayer) -> None:
        attend(layer)
        tails(layer)

    times = [us(partial(one, layer) for layer in layers) for one in (both, attend, tails)]
    tiles = tiles_of(q.shape[1], layers[0].key.shape[2])
    print(
        f"  {plan.max_splits:2} splits of {plan.split_sizes[0]}: all {times[0]}, "
        f"attend {times[1]}, tails and merge {times[2]}; "
        f"{plan.piece_starts[-1] * tiles.head_groups} pieces",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", default=["chosen", "1", "2", "4", "8", "16"])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    counts = [None if count == "chosen" else int(count) for count in arguments.counts]
    assert all(count is None or 1 <= count <= SHORT_SPLITS for count in counts), counts
    print(torch.__version__, torch.cuda.get_device_name())
    for model in MODELS:
        chunks(model, counts, arguments.only)
        decodes(model, counts, arguments.only)


if __name__ == "__main__":
    main()
