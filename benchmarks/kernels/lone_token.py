"""Times what is fused for a single token on this GPU: each launch beside the launches it replaces.

    python benchmarks/kernels/lone_token.py

As `decode.py`: medians of CUDA graph replays over weights that together exceed the L2 cache,
floors of bytes over 3.0 TB/s (H100); a candidate that is not near the ops one by one is WRONG.
"""

from __future__ import annotations

import torch
from attention import make_batch, make_layers
from decode import (
    EXPERTS,
    ROTATED_BYTES,
    Run,
    compare,
    exact_hidden,
    exact_parts,
    label,
    make_experts,
)
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.composed import Composed
from octavo.kernels.inputs import AttentionOp, NormInput, QKNorm, RopeTable
from octavo.kernels.routing import RoutingRule
from octavo.kernels.triton.attention.choose import attention
from octavo.kernels.triton.backend import TritonOps
from octavo.kernels.triton.experts import route
from octavo.kernels.triton.experts.pairs import experts_of_pairs
from octavo.kernels.triton.experts.shapes import pairs_shape
from octavo.kernels.triton.experts.stacks import shared_parts
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.matvec import matvec
from octavo.kernels.triton.product.norm_matvec import norm_matvec, norm_route
from octavo.kernels.triton.product.shapes import RowsShape, rows_shape
from octavo.kernels.triton.small import norm
from octavo.kernels.weights import Router, SharedExpert, Weight
from octavo.visibility import Full

HIDDEN = 2048
QKV = {"qwen3": 5120, "qwen15": 6144}
HEADS = {"qwen3": (32, 4), "qwen15": (16, 16)}
ROUTERS = {"qwen3": (128, 0, 8), "qwen15": (60, 1, 4)}
"""Experts, rows of the shared expert's gate, top k."""
QKV_SHAPES = ((2, 4), (4, 4), (4, 8), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16))
"""Rows and warps of a program."""
CONTEXT = 640


def make_row() -> NormInput:
    x, residual = (torch.randn(1, HIDDEN).bfloat16() for _ in range(2))
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return NormInput(x_TM=x, residual_TM=residual, weight_M=weight, eps=1e-6)


def normed(row: NormInput) -> Tensor:
    assert row.x_TM is not None
    return norm.rms_norm(row.x_TM, row.residual_TM, row.weight_M, row.eps)


def rotated(pool: Tensor, num_rows: int, columns: int) -> Tensor:
    """Returns many matrices, [sets, rows, columns]."""
    size = num_rows * columns
    sets = min(max(32, ROTATED_BYTES // (2 * size)), len(pool) // size)
    return pool[: sets * size].view(sets, num_rows, columns)


def time_qkv(pool: Tensor, name: str) -> None:
    weights, row = rotated(pool, QKV[name], HIDDEN), make_row()
    out = torch.empty(1, QKV[name], dtype=torch.bfloat16)
    kept, separate = row.residual_TM.clone(), rows_shape(QKV[name], HIDDEN)

    def apart(at: int) -> Tensor:
        matvec(normed(row), weights[at], None, out, separate)
        return out

    exact = apart(0).clone().double()
    row.residual_TM.copy_(kept)
    x = normed(make_row())

    def product(at: int) -> Tensor:
        matvec(x, weights[at], None, out, separate)
        return out

    runs: dict[str, Run] = {}
    for sizes in QKV_SHAPES:
        shape = RowsShape(block_n=sizes[0], block_k=HIDDEN, num_warps=sizes[1])
        runs[label("fused", sizes)] = lambda at, shape=shape: norm_matvec(
            row, weights[at], None, shape
        )[0]
    size = 2.0 * weights[0].numel()
    compare(f"{name} norm, qkv", runs, len(weights), exact, size)
    compare(f"{name} norm, qkv", {"norm; product": apart}, len(weights), None, size)
    compare(f"{name} norm, qkv", {"product alone": product}, len(weights), None, size)


def time_router(pool: Tensor, name: str) -> None:
    count, gates, top_k = ROUTERS[name]
    weights, row = rotated(pool, count + gates, HIDDEN)[:256], make_row()
    form = WEIGHT_FORMATS["bf16"]
    one = Weight(data=weights[0][:count], format=form, rows=count, cols=HIDDEN)
    router = Router(weights=(one,), rule=RoutingRule(top_k=top_k, renormalize=True))
    counts, tickets = torch.zeros(count, dtype=torch.int32), make_tickets(torch.device("cuda"))
    logits = torch.empty(1, count + gates, dtype=torch.bfloat16)
    shape, kept = rows_shape(count + gates, HIDDEN), row.residual_TM.clone()

    def apart(at: int) -> Tensor:
        matvec(normed(row), weights[at], None, logits, shape)
        return route.route(logits[:, :count], router, counts, None)[0]

    exact = apart(0).clone().double()
    row.residual_TM.copy_(kept)
    runs: dict[str, Run] = {}
    for warps in (1, 2, 4, 8):
        runs[label("fused", (warps,))] = lambda at, warps=warps: (
            norm_route(
                row, router, weights[at], counts, None, tickets, num_warps=warps
            ).topk_weights
        )
    size = 2.0 * weights[0].numel()
    compare(f"{name} norm, router, route", runs, len(weights), exact, size)
    compare(f"{name} norm, router, route", {"apart": apart}, len(weights), None, size)


def time_shared(pool: Tensor, name: str, shared_size: int) -> None:
    hidden, count, top_k, inner = EXPERTS[name]
    experts, sets, ops = (
        make_experts(pool, name),
        count // top_k,
        TritonOps(1, is_deterministic=False),
    )
    ids = torch.randperm(count, dtype=torch.int32)[: sets * top_k].view(sets, 1, top_k)
    weights, x = torch.rand(1, top_k), torch.randn(1, hidden).bfloat16()
    logit = torch.zeros(1, 1, dtype=torch.bfloat16)
    pairs = pairs_shape(hidden, inner, top_k)
    form, rest = WEIGHT_FORMATS["bf16"], pool[-sets * 3 * shared_size * hidden :].view(sets, -1)
    shared = []
    for gate, up, down in (part.split(shared_size * hidden) for part in rest):
        each = [x.view(shared_size, hidden) for x in (gate, up)] + [down.view(hidden, shared_size)]
        each = [Weight(data=x, format=form, rows=x.shape[0], cols=x.shape[1]) for x in each]
        shared.append(SharedExpert(gate_up=each[:2], down=each[2]))

    def apart(at: int) -> Tensor:
        out = experts_of_pairs(x, weights, ids[at], experts, "silu", pairs)
        return ops.add_shared(out, x, shared[at], logit, "silu")

    def fused(at: int) -> Tensor:
        parts = shared_parts(shared[at], logit, inner)
        return experts_of_pairs(x, weights, ids[at], experts, "silu", pairs, parts)

    size = 2.0 * 3 * hidden * (top_k * inner + shared_size)
    runs: dict[str, Run] = {"routed; shared": apart, "fused": fused}
    exact = exact_parts(exact_hidden(x, ids[0], experts), weights, ids[0], experts).sum(0)
    gate, up, down = (one.data.double() for one in (*shared[0].gate_up, shared[0].down))
    inner_row = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    exact = exact + torch.sigmoid(logit.double()) * (inner_row @ down.T)
    compare(f"{name} moe with shared", runs, sets, exact, size)


def time_attention(name: str) -> None:
    heads, kv_heads = HEADS[name]
    layers = make_layers(64, 48, kv_heads, 128, torch.bfloat16)
    batch = make_batch([CONTEXT], [1], 64)
    q, tickets = torch.randn(1, heads, 128).bfloat16(), make_tickets(torch.device("cuda"))
    qkv, angles = torch.randn(1, (heads + 2 * kv_heads) * 128).bfloat16(), torch.randn(1024, 64)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=128)
    one = torch.ones(128, dtype=torch.bfloat16)
    qk_norm = QKNorm(query=one, key=one, eps=1e-6, per_head=True) if name == "qwen3" else None
    ops = TritonOps(1, is_deterministic=False)
    op = AttentionOp(
        **{"num_heads": heads, "num_kv_heads": kv_heads, "head_size": 128, "scale": 0.088},
        **{"visibility": Full(), "rope": rope, "qk_norm": qk_norm},
    )

    def apart(at: int) -> Tensor:
        return Composed.rope_attention(ops, qkv, op, layers[at], batch)

    def fused(at: int) -> Tensor:
        return ops.rope_attention(qkv, op, layers[at], batch)

    runs: dict[str, Run] = {
        "rope; attention": apart,
        "fused": fused,
    }
    alone: dict[str, Run] = {
        "attention alone": lambda at: attention(q, op, layers[at], batch, tickets=tickets)
    }
    size = 4.0 * CONTEXT * kv_heads * 128
    exact = apart(0).double()
    compare(f"{name} rope, attention {CONTEXT}", runs, len(layers), exact, size)
    compare(f"{name} rope, attention {CONTEXT}", alone, len(layers), None, size)


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    print(f"{'what':30} {'candidate':26}       us    floor  ratio")
    pool = torch.empty(1_300_000_000, dtype=torch.bfloat16).normal_(std=0.02)
    for name in QKV:
        time_qkv(pool, name)
        time_router(pool, name)
        time_attention(name)
    time_shared(pool, "qwen15", 5632)


if __name__ == "__main__":
    main()
