"""Times chunks over latent vectors that share a prefix on one GPU: absorbed, and multiplied out
once for all.

python benchmarks/kernels/latent_prompts.py [check] [time]

Shapes are DeepSeek-V2-Lite's: 16 heads, 512 + 64 columns, keys and values of 128. `check` compares
both with float64, and decodes that share a prefix and come behind a chunk. A floor is operations
of the cheaper form over 776 TFLOP/s.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from attention import graph_ms
from attention_cases import make_batch, share_blocks
from latent import BLOCK, CUDA, RANK, ROPE, planes, told
from latent import exact as exact_absorbed

from octavo.kernels.facts import lone_partials
from octavo.kernels.inputs import AttentionBatch, KVLayer, LatentOp, RopeTable
from octavo.kernels.planning import PlanLimits, PlannedGroup, StepRows
from octavo.kernels.triton.attention.partials import make_partials
from octavo.kernels.triton.attention.plan import StepPlanner
from octavo.kernels.triton.attention.shared import plan_shared_prefix
from octavo.kernels.triton.attention.splits import latent_tiling
from octavo.kernels.triton.latent import decode, shared
from octavo.kernels.triton.latent.choose import latent_attention, latent_views
from octavo.kernels.triton.launching.chip import num_processors
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.visibility import Full

HEADS, NOPE, VALUE = 16, 128, 128
FLOPS = 776e12
LIMITS = PlanLimits(max_num_seqs=256, max_model_len=40_960, kv_tokens=1_400_000)


def op_of(num_heads: int = HEADS) -> LatentOp:
    """A layer that rotates nothing, so that what pages hold is what is attended."""
    both = torch.randn(num_heads * (NOPE + VALUE), RANK, device=CUDA) / math.sqrt(RANK)
    none = torch.zeros(40_960, ROPE // 2, device=CUDA)
    return LatentOp(
        num_heads=num_heads,
        rank=RANK,
        nope_size=NOPE,
        rope_size=ROPE,
        value_size=VALUE,
        scale=0.1,
        rope=RopeTable(cos=none + 1, sin=none, rotary_dim=ROPE),
        norm_R=torch.ones(RANK, device=CUDA),
        norm_eps=1e-6,
        weights=latent_views(both.bfloat16(), num_heads, NOPE),
    )


def planned(
    batch: AttentionBatch, lens: list[int], query_lens: list[int], op: LatentOp
) -> tuple[AttentionBatch, bool]:
    """Returns the batch as the back end plans it, and whether its chunks are multiplied out."""
    group = PlannedGroup(
        num_heads=op.num_heads,
        num_kv_heads=1,
        is_latent=True,
        expanding_queries=op.expanding_queries,
        visibility=Full(),
        token_bytes=27 * 2 * (RANK + ROPE),
        block_size=BLOCK,
    )
    rows = StepRows(
        rows=np.arange(len(lens), dtype=np.int32),
        query_lens=np.array(query_lens, np.int32),
        query_starts=np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32),
        seq_lens=np.array(lens, np.int32),
        tables=(batch.block_table.cpu().numpy(),),
        num_started=0,
    )
    step = StepPlanner([group], LIMITS, num_processors(CUDA)).plan(rows)
    arrays = [torch.from_numpy(array).to(CUDA) for array in step.arrays]
    return step.on_device([batch], arrays)[0], step.prompts is not None


def exact(q_TN: torch.Tensor, op: LatentOp, layer: KVLayer, batch: AttentionBatch) -> torch.Tensor:
    """float64, keys and values of every head multiplied out of what the pages hold."""
    heads = op.weights.both_NR.double().view(op.num_heads, -1, RANK)
    parts = []
    for s, n in enumerate(batch.seq_lens_S.tolist()):
        a, b = batch.query_starts[s : s + 2].tolist()
        blocks = batch.block_table[s, : -(-n // BLOCK)].long()
        seen = layer.planes["latent"][blocks].flatten(0, 1)[:n].double()
        hidden = torch.arange(n, device=CUDA) > batch.positions_T[a:b].unsqueeze(1)
        of_heads = []
        for h, weights in enumerate(heads):
            both = seen[:, :RANK] @ weights.T
            q = q_TN[a:b].double().view(b - a, op.num_heads, -1)[:, h]
            scores = q[:, :NOPE] @ both[:, :NOPE].T + q[:, NOPE:] @ seen[:, RANK:].T
            scores = (scores * op.scale).masked_fill(hidden, -math.inf).softmax(-1)
            of_heads.append(scores @ both[:, NOPE:])
        parts.append(torch.cat(of_heads, 1))
    return torch.cat(parts)


def step_of(
    lens: list[int], query_lens: list[int], shared_blocks: int, num_layers: int
) -> tuple[LatentOp, AttentionBatch, list[KVLayer], tuple[torch.Tensor, torch.Tensor]]:
    num_blocks = sum(-(-n // BLOCK) for n in lens) + 8
    layers = [KVLayer(latent=plane.numbers) for plane in planes(num_blocks, 0)[:num_layers]]
    batch, op = make_batch(lens, query_lens, num_blocks), op_of()
    if shared_blocks:
        share_blocks(batch, shared_blocks)
    total = sum(query_lens)
    q_TN = torch.randn(total, HEADS * (NOPE + ROPE), device=CUDA).bfloat16()
    latent_TC = torch.randn(total, RANK + ROPE, device=CUDA).bfloat16()
    return op, batch, layers, (q_TN, latent_TC)


CHECKS = {
    "8 x 128 on 4,096": ([4224] * 8, [128] * 8, 256),
    "odd ones, a decode among them": (
        [3200, 3171, 3100, 4000, 3333, 3091],
        [128, 99, 1, 700, 261, 19],
        192,
    ),
    "two ranges of keys": ([20_000 + 64] * 5, [64] * 5, 1250),
    "one prompt after 20,000": ([20_480], [480], 0),
    "32 x 64 on 32,768": ([32_832] * 32, [64] * 32, 2048),
}


def check() -> None:
    tickets = make_tickets(CUDA)
    for case, (lens, query_lens, blocks) in CHECKS.items():
        op, batch, (layer, *_), asked = step_of(lens, query_lens, blocks, 1)
        there, is_out = planned(batch, lens, query_lens, op)
        for name, one in (("out", there), ("absorbed", replace(batch, plan=None))):
            found = latent_attention(
                *(*asked, op, layer, one), is_deterministic=False, tickets=tickets
            )
            expected = exact(asked[0], op, layer, batch)
            told(f"{case}, {name}{'' if is_out else ' (not planned)'}", found, expected)
    check_decodes_behind_a_chunk()


def check_decodes_behind_a_chunk() -> None:
    """Tokens and sequences are counted apart: partial results lie by sequences."""
    for heads in (8, 16, 128):
        lens, query_lens = [2200, *[2100, 2117, 3000] * 5], [70, *[1] * 15]
        num_blocks = sum(-(-n // BLOCK) for n in lens) + 8
        plane = planes(num_blocks, 0)[0]
        batch = make_batch(lens, query_lens, num_blocks)
        table = share_blocks(batch, 130)
        sizes = np.array(lens, np.int32), np.array(query_lens, np.int32)
        plan = plan_shared_prefix(table, *sizes, latent_tiling(heads, num_processors(CUDA)))
        assert plan is not None
        prefix = plan.to_device(CUDA)
        q = torch.randn(sum(query_lens), heads, RANK + ROPE, device=CUDA).bfloat16()
        out = torch.full((len(q), heads, RANK), math.nan, device=CUDA).bfloat16()
        most = prefix.max_splits + lone_partials(len(lens), prefix.max_tail)
        partials = make_partials(out, most, None, len(lens) * most)
        shared.shared_latents(q, plane, batch, 0.1, prefix, partials)
        decode.latent_decode(
            *(q, plane, batch, 0.1, out),
            max_seq_len=prefix.max_tail,
            shared=(prefix.shared_tokens_S, prefix.shared_partials_S),
            partials=partials,
            tickets=make_tickets(CUDA),
        )
        expected = exact_absorbed(q, plane, batch)[70:]
        told(f"decodes behind a chunk, {heads} heads", out[70:], expected)


def time_of(case: str, lens: list[int], query_lens: list[int], blocks: int) -> None:
    op, batch, layers, asked = step_of(lens, query_lens, blocks, 2)
    there, is_out = planned(batch, lens, query_lens, op)
    tickets = make_tickets(CUDA)
    pairs = sum(q * (n - q / 2) for n, q in zip(lens, query_lens, strict=True))
    keys = blocks * BLOCK + sum(lens) - len(lens) * blocks * BLOCK
    absorbed = 2 * HEADS * pairs * (2 * RANK + ROPE)
    out = 2 * HEADS * (pairs * (NOPE + ROPE + VALUE) + keys * RANK * (NOPE + VALUE))
    floor = min(absorbed, out) / FLOPS * 1e6
    us = []
    for one in (replace(batch, plan=None), there):
        calls = [
            partial(
                latent_attention, *asked, op, layer, one, is_deterministic=False, tickets=tickets
            )
            for layer in layers
        ]
        us.append(1e3 * graph_ms(calls, 5))
    ratio = us[1] / floor
    print(f"| {case} | {is_out} | {floor:.0f} | {us[0]:.0f} | {us[1]:.0f} | {ratio:.2f} |")


def main() -> None:
    wanted = sys.argv[1:] or ["check", "time"]
    if "check" in wanted:
        check()
    if "time" in wanted:
        print("| case | multiplied out | floor us | absorbed us | planned us | ratio |")
        time_of("32 x 64 on 32,768", [32_832] * 32, [64] * 32, 2048)
        time_of("8 x 64 on 32,768", [32_832] * 8, [64] * 8, 2048)
        time_of("16 x 128 on 2,048", [2176] * 16, [128] * 16, 128)
        time_of("1,024 after 32,768", [33_792], [1024], 0)
        time_of("64 after 32,768", [32_832], [64], 0)


if __name__ == "__main__":
    main()
