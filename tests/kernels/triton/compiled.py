"""Compiles kernels for a Hopper that the interpreter alone would have seen; no GPU is needed.

Run by test_compiled.py as `python -m tests.kernels.triton.compiled CASE`. The interpreter takes
what the compiler refuses (a branch on a constant that both sides reach, types that differ by
branch), so every kind of kernel is compiled once. Prints a line a kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from octavo.kernels.triton.launching import chip

chip.is_hopper = lambda device: True  # before the kernels' modules ask it

from octavo.formats import WEIGHT_FORMATS, kv_formats  # noqa: E402
from octavo.kernels.cells import KEPT_BLOCKS  # noqa: E402
from octavo.kernels.facts import PEER_BYTES  # noqa: E402
from octavo.kernels.inputs import (  # noqa: E402
    AttentionBatch,
    AttentionOp,
    KVLayer,
    LatentOp,
    QKNorm,
    RopeTable,
)
from octavo.kernels.planes import empty_planes  # noqa: E402
from octavo.kernels.routing import RoutingRule  # noqa: E402
from octavo.kernels.triton.attention import choose  # noqa: E402
from octavo.kernels.triton.attention.decode import decode_attention  # noqa: E402
from octavo.kernels.triton.attention.device_plan import DevicePlan  # noqa: E402
from octavo.kernels.triton.backend import TritonOps  # noqa: E402
from octavo.kernels.triton.experts import choose as choose_experts  # noqa: E402
from octavo.kernels.triton.experts.choose import run_experts  # noqa: E402
from octavo.kernels.triton.experts.ordered import rows_of_pairs  # noqa: E402
from octavo.kernels.triton.experts.stacks import StackedExperts  # noqa: E402
from octavo.kernels.triton.peers.sums import PeerSums  # noqa: E402
from octavo.kernels.triton.product.choose import multiply, multiply_packed  # noqa: E402
from octavo.kernels.triton.product.grids import unpack_blocks  # noqa: E402
from octavo.kernels.triton.tiles.hopper.ring import takes  # noqa: E402
from octavo.kernels.triton.tuning.shapes import Shapes  # noqa: E402
from octavo.kernels.weights import Router, Weight  # noqa: E402
from octavo.kv_cache.spec import attention_kv, group_layers, latent_kv  # noqa: E402
from octavo.kv_cache.storage import KVStorage  # noqa: E402
from octavo.parallel import PeerMemory  # noqa: E402
from octavo.planes import PLANE_LAYOUTS  # noqa: E402
from octavo.visibility import Chunk, Full, Window  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
BF16 = torch.bfloat16


def compile_instead(function: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
    """Stands for the launch of a kernel: compiles it and runs nothing."""
    constants, options, attributes = rest[:3]
    source = function.ASTSource(function, signature, constants, attributes)
    built = function.compile(source, target=HOPPER, options=options.__dict__)
    print(function.__name__, built.metadata.shared, *_registers(built.asm["cubin"]), flush=True)
    assert built.metadata.shared <= 227 << 10, function.__name__
    nothing = SimpleNamespace(
        run=lambda *arguments: None,
        launch_metadata=lambda *arguments: None,
        function=0,
        packed_metadata=(),
    )
    function.device_caches[device][0][key] = nothing
    return nothing


def _registers(cubin: bytes) -> tuple[str, ...]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(re.findall(r"(?:REG|STACK):(\d+)", told))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def routing() -> None:
    ops = TritonOps(1, is_deterministic=False)
    weight = Weight(
        data=torch.zeros(16, 32, dtype=BF16), format=WEIGHT_FORMATS["bf16"], rows=16, cols=32
    )
    for rule in (
        RoutingRule(top_k=2, renormalize=False, scale=2.0),
        RoutingRule(
            top_k=2, score="sigmoid", num_groups=4, top_groups=2, group_score="best_two",
            renormalize=True, sum_epsilon=1e-20, scale=2.5,
        ),
        RoutingRule(top_k=2, score="sqrt_softplus", renormalize=True),
        RoutingRule(top_k=2, score="logit", weighting="softmax", renormalize=False),
        RoutingRule(top_k=1, score="logit", weighting="sigmoid", renormalize=False),
    ):  # fmt: skip
        correction = torch.zeros(16) if rule.score == "sigmoid" else None
        router = Router(weights=(weight,), rule=rule, bias_E=None, correction_E=correction)
        ops.route(torch.zeros(4, 16, dtype=BF16), router, torch.zeros(16, dtype=torch.int64))


def batch_of(num_tokens: int, num_sequences: int, **bounds: int) -> AttentionBatch:
    return AttentionBatch(
        positions_T=zeros(num_tokens),
        slot_mapping_T=torch.zeros(num_tokens, dtype=torch.int64),
        query_starts=torch.arange(num_sequences + 1, dtype=torch.int32)
        * (num_tokens // num_sequences),
        seq_lens_S=zeros(num_sequences),
        block_table=zeros(num_sequences, 64),
        plan=DevicePlan(**bounds),  # type: ignore[arg-type]
    )


def attention() -> None:
    arena = torch.zeros(4, 2, 16, 2, 64, dtype=BF16)
    layer, q = KVLayer(key=arena[:, 0], value=arena[:, 1]), torch.zeros(140, 8, 64, dtype=BF16)
    op = AttentionOp(
        num_heads=8, num_kv_heads=2, head_size=64, scale=0.1, visibility=Full(), rope=None,
        qk_norm=None,
    )  # fmt: skip
    angles = torch.zeros(64, 32)
    for one in (
        replace(op, sinks_H=torch.zeros(8), visibility=Window(128)),
        replace(op, visibility=Chunk(64), soft_cap=30.0),
    ):
        choose.attention(q, one, layer, batch_of(140, 2))
        rotated = replace(one, rope=RopeTable(cos=angles, sin=angles, rotary_dim=64))
        for whole in (one, rotated):
            decode_attention(
                *(torch.zeros(2, 12, 64, dtype=BF16), whole, layer, batch_of(2, 2)),
                torch.zeros(2, 8, 64, dtype=BF16),
                max_seq_len=1024,
                is_qkv=True,
            )


def kv_formats_of(name: str) -> None:
    """Decodes with and without the write, chunks of few queries and of many, unpacked and not."""
    kv = kv_formats(name)
    spec = attention_kv(2, 128, kv.key, value_format=kv.value)
    layer = KVStorage(group_layers((spec, spec)), 4, 16).layer(0)
    angles = torch.zeros(64, 64)
    op = AttentionOp(
        num_heads=8, num_kv_heads=2, head_size=128, scale=0.1, visibility=Full(), qk_norm=None,
        rope=RopeTable(cos=angles, sin=angles, rotary_dim=128),
    )  # fmt: skip
    ops = TritonOps(1, is_deterministic=False)
    ops.rope_attention(torch.zeros(2, 12 * 128, dtype=BF16), op, layer, batch_of(2, 2))
    norm = QKNorm(
        query=torch.zeros(8 * 128), key=torch.zeros(2 * 128), eps=1e-6, per_head=False
    )  # fmt: skip
    both = torch.zeros(40, 12 * 128, dtype=BF16)
    ops.rope_and_cache(both, replace(op, qk_norm=norm), layer, batch_of(40, 2))
    many = batch_of(2304, 2, max_seq_len=2000, max_query_len=1152, num_short_tokens=100)
    ops.rope_attention(torch.zeros(2304, 12 * 128, dtype=BF16), op, layer, many)
    q = torch.zeros(140, 8, 128, dtype=BF16)
    choose.prefill_attention(q, op, layer, batch_of(140, 2), torch.zeros_like(q))


def latent(num_tokens: int, num_sequences: int, format: str = "bfloat16", **bounds: int) -> None:
    heads, rank, nope, rope, value = 16, 512, 128, 64, 128
    ops = TritonOps(1, is_deterministic=False)
    up = torch.zeros(heads * (nope + value), rank, dtype=BF16)
    weight = Weight(data=up, format=WEIGHT_FORMATS["bf16"], rows=up.shape[0], cols=rank)
    angles = torch.zeros(64, rope // 2)
    op = LatentOp(
        num_heads=heads,
        rank=rank,
        nope_size=nope,
        rope_size=rope,
        value_size=value,
        scale=0.1,
        rope=RopeTable(cos=angles, sin=angles, rotary_dim=rope),
        norm_R=torch.zeros(rank),
        norm_eps=1e-6,
        weights=ops.prepare_latent(weight, heads, nope),
    )
    spec = latent_kv(rank, rope, kv_formats(format).key)
    layer = KVStorage(group_layers((spec, spec)), 4, 16).layer(0)
    made = torch.zeros(num_tokens, heads * (nope + rope) + rank + rope, dtype=BF16)
    q_TN, latent_TC = made.split([heads * (nope + rope), rank + rope], dim=1)
    torch.bmm = lambda x, y, out: out  # type: ignore[assignment]
    batch = batch_of(num_tokens, num_sequences, max_seq_len=512, **bounds)
    ops.latent_attention(q_TN, latent_TC, op, layer, batch)


def packed(name: str) -> None:
    """Dense products and experts of few tokens, of some, and of many, unpacked rows."""
    layout = PLANE_LAYOUTS[name]
    torch.mm = lambda x, y, out: out  # type: ignore[assignment]
    for cols in (1184, 1024) if takes(layout, 1024) else (1184,):
        weight = empty_planes(layout, 256, cols, torch.device("cpu"))
        for count in (1, 30, 60, 600):
            x, out = torch.zeros(count, cols, dtype=BF16), torch.zeros(count, 256, dtype=BF16)
            multiply_packed(x, weight, layout, None, out, is_deterministic=False)
    gates = empty_planes(layout, 8 * 512, 1024, torch.device("cpu"))
    downs = empty_planes(layout, 8 * 1024, 512, torch.device("cpu"))
    experts = StackedExperts(
        gate_EFM=gates.codes.view(8, 512, -1),
        up_EFM=gates.codes.view(8, 512, -1),
        down_EMF=downs.codes.view(8, 1024, -1),
        gate_up_planes=(gates, gates),
        gate_layout=layout,
        down_planes=downs,
        down_layout=layout,
    )
    for count in (1, 40, 120, 400):
        run_experts(
            *(torch.zeros(count, 1024, dtype=BF16), torch.zeros(count, 2), zeros(count, 2)),
            *(experts, "silu", None, None, Shapes()),
            is_deterministic=False,
            in_parts=False,
        )


def kept() -> None:
    """Blocks that a device keeps as they are stored, and rows of experts' own orders."""
    for name in KEPT_BLOCKS:
        form = WEIGHT_FORMATS[name]
        table = torch.zeros(form.table_size) if form.has_table else None
        data = torch.zeros(8, form.row_bytes(512), dtype=torch.uint8)
        weight = Weight(data=data, format=form, rows=8, cols=512, table=table)
        unpack_blocks(weight, BF16)
        unpack_blocks(weight, BF16, zeros(3), 2)
    rows_of_pairs(torch.zeros(5, 1024, dtype=BF16), zeros(5, 2), zeros(8, 1024))


def sums(size: int) -> None:
    """Of few rows and of many, with and without the norm, of rows and of parts."""
    base = SimpleNamespace(rank=1, size=size, least=list)
    buffers = tuple(torch.zeros(PEER_BYTES, dtype=torch.uint8) for _ in range(size))
    memory = PeerMemory(buffers=buffers, stop=zeros(1))
    for dtype in (BF16, torch.float32):
        over = PeerSums(base, memory, 2048, dtype)  # type: ignore[arg-type]
        for count in (1, 300) if size == 2 else (1,):
            x, weight = torch.zeros(count, 2048, dtype=dtype), torch.zeros(2048, dtype=dtype)
            over.all_reduce(x)
            over.add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
            parts = torch.zeros(count, 8, 2048, dtype=dtype)
            for ids in (None, zeros(count, 8)):
                over.add_rms_norm(parts, torch.zeros_like(x), weight, 1e-6, ids)


def numbers() -> None:
    """Few rows of large matrices of numbers, and many of large experts."""
    for count, cols in ((2, 256), (30, 8192)):
        x, weight = torch.zeros(count, cols, dtype=BF16), torch.zeros(2048, cols, dtype=BF16)
        out, bias = torch.zeros(count, 2048, dtype=BF16), torch.zeros(2048)
        multiply(x, weight, bias, out, Shapes(), zeros(99), is_deterministic=False)
    choose_experts.many.num_processors = lambda device: 132
    gate, down = torch.zeros(2, 4096, 256, dtype=BF16), torch.zeros(2, 256, 4096, dtype=BF16)
    experts = StackedExperts(gate_EFM=gate, up_EFM=gate, down_EMF=down)
    run_experts(
        *(torch.zeros(512, 256, dtype=BF16), torch.zeros(512, 2), zeros(512, 2)),
        *(experts, "silu", None, None, Shapes()),
        is_deterministic=False,
        in_parts=True,
    )


CASES: dict[str, Callable[[], None]] = {
    "routing": routing,
    "attention": attention,
    "kv fp8": lambda: kv_formats_of("fp8"),
    "kv int8/int4": lambda: kv_formats_of("int8/int4"),
    "latent decode": lambda: latent(4, 4, max_query_len=1, num_short_tokens=0),
    "latent short": lambda: latent(64, 4, max_query_len=16, num_short_tokens=64),
    "latent long": lambda: latent(2304, 1, max_query_len=2304, num_short_tokens=0),
    "latent int4": lambda: latent(4, 4, "int4", max_query_len=1, num_short_tokens=0),
    **{f"packed {name}": partial(packed, name) for name in PLANE_LAYOUTS},
    "numbers": numbers,
    "kept": kept,
    "sums of 2": lambda: sums(2),
    "sums of 4": lambda: sums(4),
    "latent fp8": lambda: latent(2304, 1, "fp8", max_query_len=2304, num_short_tokens=0),
}

if __name__ == "__main__":
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: HOPPER,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction._do_compile = lambda self, *arguments: compile_instead(self, *arguments)
    CASES[sys.argv[1]]()
