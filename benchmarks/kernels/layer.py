"""Times whole decode steps of decoder layers on one GPU, captured in one CUDA graph, and checks
that early launches change no bit (a race would). Also what is fused for decodes, against the ops
one by one.

    python benchmarks/kernels/layer.py [--models qwen3,qwen15] [--batches 1,32]
        [--contexts 600,1200] [--profile]

us a layer: a graph of embedding, LAYERS layers with weights of their own and the final norm, over
the layers; the median of ROUNDS rounds over all modes, since a GPU's speed drifts. Floor: bytes of
weights, of experts hit and of KV over 3.0 TB/s (measured on an H100). "token" is that for all
layers of the model plus the LM head. Profiled kernels that overlap also count the time they wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from statistics import median
from types import SimpleNamespace as Namespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from experts import replay_us
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.composed import Composed
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, QKNorm, RopeTable
from octavo.kernels.routing import RoutingRule
from octavo.kernels.triton.attention.device_plan import DevicePlan, plan_of
from octavo.kernels.triton.attention.partials import max_total_partials, partial_counts
from octavo.kernels.triton.backend import TritonOps
from octavo.kernels.triton.experts import choose, grouped
from octavo.kernels.triton.launching import overlap
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight
from octavo.layers.attention import Attention
from octavo.layers.moe import MoE
from octavo.layers.norm import RMSNorm
from octavo.models.decoder import Decoder, Layer
from octavo.visibility import Full

BYTES_PER_US = 3.0e6
BLOCK, MAX_SEQ_LEN = 16, 40_960
LAYERS, REPLAYS, ROUNDS = 8, 50, 21
MODES = ("serial", "overlap")
FIELDS = ("layers", "heads", "kv_heads", "experts", "top_k", "inner", "shared")
SHAPES = {"qwen3": (48, 32, 4, 128, 8, 768, 0), "qwen15": (24, 16, 16, 60, 4, 1408, 5632)}
HIDDEN, HEAD_SIZE, VOCABULARY = 2048, 128, 151_936
"""Of both."""


def matrices(count: int, rows: int, cols: int) -> tuple[Weight, ...]:
    """Returns random matrices that follow each other in one stack."""
    stack = torch.empty(count, rows, cols, dtype=torch.bfloat16).normal_(std=cols**-0.5)
    form = WEIGHT_FORMATS["bf16"]
    return tuple(Weight(data=one, format=form, rows=rows, cols=cols) for one in stack)


def make_layer(s: Namespace, rope: RopeTable, layer: int, ops: TritonOps) -> Layer:
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    norm, head = RMSNorm(weight=ones, eps=1e-6), ones[:HEAD_SIZE]
    gate_up = matrices(2 * s.experts, s.inner, HIDDEN)
    down = matrices(s.experts, HIDDEN, s.inner)
    shared = None
    if s.shared:
        (both,) = matrices(1, 2 * s.shared, HIDDEN)
        two = both.parts([s.shared, s.shared])
        shared = SharedExpert(gate_up=two, down=matrices(1, HIDDEN, s.shared)[0])
    columns = (s.heads + 2 * s.kv_heads) * HEAD_SIZE
    op = AttentionOp(
        **{"num_heads": s.heads, "num_kv_heads": s.kv_heads, "head_size": HEAD_SIZE},
        **{"scale": HEAD_SIZE**-0.5, "visibility": Full(), "rope": rope},
        qk_norm=None if s.shared else QKNorm(query=head, key=head, eps=1e-6, per_head=True),
    )
    attention = Attention(
        layer=layer,
        op=op,
        qkv=matrices(1, columns, HIDDEN),
        output=matrices(1, HIDDEN, s.heads * HEAD_SIZE)[0],
    )
    router = Router(
        weights=router_weights(s),
        rule=RoutingRule(top_k=s.top_k, renormalize=not s.shared),
    )
    moe = MoE(
        counts_row=layer,
        router=router,
        experts=ExpertWeights(gate=gate_up[0::2], up=gate_up[1::2], down=down),
        **{"shared": shared, "activation": "silu"},
    )
    return Layer(
        mixer_norm=norm, mixer=attention.prepared(ops), mlp_norm=norm, mlp=moe.prepared(ops)
    )


def router_weights(s: Namespace) -> tuple[Weight, ...]:
    (whole,) = matrices(1, s.experts + bool(s.shared), HIDDEN)
    return whole.parts([s.experts, 1] if s.shared else [s.experts])


class OneByOne(TritonOps):
    """What TritonOps fuses for decodes, one by one."""

    norm_linear, norm_route = Composed.norm_linear, Composed.norm_route
    rope_attention = Composed.rope_attention

    def moe(self, x_TM, weights, ids, experts, activation, shared=None, gate_T1=None, **more):  # type: ignore[override]
        out = super().moe(x_TM, weights, ids, experts, activation)
        return self.add_shared(out, x_TM, shared, gate_T1, activation)


class RopeByItself(TritonOps):
    rope_attention = Composed.rope_attention


class Sorted(TritonOps):
    """The pairs of few tokens are sorted, and their shared expert runs by itself."""

    def moe(self, x_TM, weights, ids, experts, activation, shared=None, gate_T1=None, **more):  # type: ignore[override]
        never = lambda ids: False
        with patch.object(choose, "is_few", never), patch.object(grouped, "is_few", never):
            return super().moe(x_TM, weights, ids, experts, activation, shared, gate_T1, **more)


class Combined(TritonOps):
    """Experts' parts are added by a kernel of their own, not by the next norm."""

    def moe(self, *arguments, in_parts=False):  # type: ignore[override]
        return super().moe(*arguments)


OPS = {
    "combined": Combined,
    "sorted": Sorted,
    "one by one": OneByOne,
    "rope by itself": RopeByItself,
}


class Step:
    """A decode step of `batch` sequences of about `context` tokens with inputs that change."""

    def __init__(self, shape: Namespace, model: Decoder, batch: int, context: int) -> None:
        self.model, self.context = model, context
        columns = -(-context // BLOCK)
        sizes = (batch * columns, LAYERS, 2, BLOCK, shape.kv_heads, HEAD_SIZE)
        kv = torch.randn(sizes, dtype=torch.bfloat16)
        self.storage: Any = Namespace(
            group_of=lambda layer: 0,
            layer=lambda layer: KVLayer(key=kv[:, layer, 0], value=kv[:, layer, 1]),
        )
        table = torch.zeros(batch, MAX_SEQ_LEN // BLOCK, dtype=torch.int32)
        table[:, :columns] = torch.randperm(batch * columns).view(batch, columns)
        self.tokens = torch.zeros(batch, dtype=torch.int32)
        self.counts = torch.zeros(LAYERS, shape.experts, dtype=torch.int32)
        self.batch = AttentionBatch(
            positions_T=torch.zeros_like(self.tokens),
            slot_mapping_T=torch.zeros(batch, dtype=torch.int64),
            query_starts=torch.arange(batch + 1, dtype=torch.int32),
            seq_lens_S=torch.zeros_like(self.tokens),
            block_table=table,
            plan=DevicePlan(
                partial_starts_S=torch.zeros(batch + 1, dtype=torch.int32),
                max_partials=max_total_partials(batch, MAX_SEQ_LEN, batch * columns * BLOCK),
                **{"max_query_len": 1, "max_seq_len": MAX_SEQ_LEN, "num_short_tokens": 0},
            ),
        )

    def renew(self, rng: np.random.Generator) -> None:
        """Other tokens and lengths, as a graph's owner would set them before a replay."""
        count, batch = len(self.tokens), self.batch
        lens = rng.integers(self.context - self.context // 10, self.context, count)
        plan_of(batch).partial_starts_S.copy_(
            torch.from_numpy(np.cumsum([0, *partial_counts(lens, None)]))
        )
        batch.seq_lens_S.copy_(torch.from_numpy(lens))
        batch.positions_T.copy_(batch.seq_lens_S - 1)
        position = batch.positions_T.long()
        block = batch.block_table.gather(1, (position // BLOCK)[:, None])[:, 0].long()
        batch.slot_mapping_T.copy_(block * BLOCK + position % BLOCK)
        self.tokens.copy_(torch.from_numpy(rng.integers(0, self.model.embedding.rows, count)))
        self.counts.zero_()

    def run(self) -> Tensor:
        return self.model.forward(self.tokens, (self.batch,), self.storage, self.counts)

    def floor_us(self, shape: Namespace) -> float:
        """Microseconds a layer of the last run needs at least."""
        s, lens = shape, int(self.batch.seq_lens_S.sum())
        hit = int((self.counts > 0).sum()) / LAYERS
        weights = HIDDEN * (2 * (s.heads + s.kv_heads) * HEAD_SIZE + s.experts)
        weights += 3 * HIDDEN * (hit * s.inner + s.shared)
        return 2 * (weights + 2 * lens * s.kv_heads * HEAD_SIZE) / BYTES_PER_US


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Kernels launched within are set up early, or are not."""
    overlap.launch_options.cache_clear()
    with patch.object(overlap, "is_hopper", lambda device: name != "serial"):
        yield
    overlap.launch_options.cache_clear()


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def layers_us(graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]]) -> dict[str, float]:
    """Returns the median microseconds of a layer of each graph, replayed in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, _) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / LAYERS)
    return {name: median(found) for name, found in times.items()}


def profile(graph: torch.cuda.CUDAGraph) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda e: -e.self_device_time_total):
        us = event.self_device_time_total / LAYERS
        print(f"    {event.key[:40]:40} x {event.count:4} {us:7.2f} us a layer")


def measure(shape: Namespace, model: Decoder, step: Step, is_profiled: bool) -> str:
    """Returns a line of figures; raises where a mode's bits differ from the serial ones (but for
    those of ops one by one and of another plan)."""
    rng, graphs, cells = np.random.default_rng(0), {}, []
    step.renew(rng)
    errors: dict[str, list[float]] = {name: [] for name in OPS}
    for name in (*MODES, *OPS):
        ops = OPS.get(name, TritonOps)
        step.model = replace(model, ops=ops(1, is_deterministic=False))
        with mode(name):
            graph, hidden = graphs[name] = capture(step.run)
        if is_profiled:
            print(f"  {name}")
            profile(graph)
    head_us = replay_us([lambda: model.ops.logits(hidden, model.lm_head)])
    for name, layer_us in layers_us(graphs).items():
        token_ms = (shape.layers * layer_us + head_us) / 1e3
        cells.append(f"\n    {name:16} {layer_us:8.1f} us a layer {token_ms:6.2f} ms a token")
    for replay in range(REPLAYS):
        step.renew(rng)
        for graph, _ in graphs.values():
            graph.replay()
        expected = graphs["serial"][1]
        for name, (_, found) in graphs.items():
            if name in OPS:  # Rounding may choose another expert.
                error = (found - expected).float().norm() / expected.float().norm()
                errors[name].append(float(error))
                continue
            assert torch.equal(found, expected), f"{name} differs from serial in replay {replay}"
    assert all(median(found) < 0.5 for found in errors.values()), errors
    step.counts.zero_()
    graphs["serial"][0].replay()
    return f"{step.floor_us(shape):8.1f} same bits x {REPLAYS}" + "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, choice in ("models", "qwen3,qwen15"), ("batches", "1,32"), ("contexts", "600,1200"):
        parser.add_argument("--" + name, default=choice)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bf16")
    print("model batch context floor us")
    both = [list(map(int, x.split(","))) for x in (arguments.batches, arguments.contexts)]
    for name in arguments.models.split(","):
        shape = Namespace(**dict(zip(FIELDS, SHAPES[name], strict=True)))
        angles = torch.randn(MAX_SEQ_LEN, HEAD_SIZE // 2)
        rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=HEAD_SIZE)
        ops = TritonOps(1, is_deterministic=False)
        layers = tuple(make_layer(shape, rope, at, ops) for at in range(LAYERS))
        embedding, head = (matrices(1, VOCABULARY, HIDDEN)[0] for _ in range(2))
        parts = {"layers": layers, "final_norm": layers[0].mlp_norm, "embedding": embedding}
        parts |= {"lm_head": head, "spec": None}
        model = Decoder(ops=ops, **parts)
        for batch, context in product(*both):
            found = measure(shape, model, Step(shape, model, batch, context), arguments.profile)
            print(f"{name:6} {batch:5} {context:7} {found}", flush=True)


if __name__ == "__main__":
    main()
