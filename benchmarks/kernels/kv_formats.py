"""Times attention over keys and values in fp8, int8 and int4 beside bf16 on one GPU.

python benchmarks/kernels/kv_formats.py [check] [decode] [prefill] [write] [latent] [--json FILE]

`check` compares with float64 over what is left of keys and values. A floor is the bytes of the
format over 3.0 TB/s, or operations over 780 TFLOP/s, whichever is longer (measured ceilings of an
H100 SXM). The last column is the time against bf16's. All times are of graphs over layers that are
together larger than the L2 cache. --json writes a line a figure as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice, repeat

import torch
from attention import BYTES_PER_SECOND, FLOPS_PER_SECOND, graph_ms
from attention_cases import BLOCK, exact, make_batch, norm_error, tiles_of

from octavo.formats import kv_formats
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, RopeTable
from octavo.kernels.kv_pages import mixed_as, read_vectors, write_vectors
from octavo.kernels.triton.attention.choose import attention
from octavo.kernels.triton.attention.device_plan import DevicePlan
from octavo.kernels.triton.attention.shared import plan_shared_prefix, shared_prefix_attention
from octavo.kernels.triton.attention.write import rope_and_cache
from octavo.kernels.triton.latent.decode import latent_decode
from octavo.kernels.triton.latent.pages import latent_plane
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.small.mixing import mix_rows
from octavo.kv_cache.spec import KVSpec, attention_kv, group_layers, latent_kv
from octavo.kv_cache.storage import KVStorage
from octavo.visibility import Full

FORMATS = ("bfloat16", "fp8", "int8", "int4", "int8/int4")
MODELS = {"qwen3-30b": (32, 4, 128), "qwen1.5-moe": (16, 16, 128)}
CUDA = torch.device("cuda", 0)
LEAST_BYTES = 256 << 20
"""Of the layers that a graph goes through, so that none is left in the L2 cache."""


def layers_of(
    spec: KVSpec, num_blocks: int, parts: tuple[int, ...] = (), *, least: int = LEAST_BYTES
) -> list[KVLayer]:
    """Returns layers full of random vectors."""
    one = num_blocks * spec.offsets(BLOCK)[-1]
    count = max(2, -(-least // one))
    storage = KVStorage(group_layers((spec,) * count), num_blocks, BLOCK, CUDA)
    layers = [KVLayer(parts, **storage.layer(i).planes) for i in range(count)]
    slots = torch.arange(num_blocks * BLOCK, device=CUDA)
    vectors = [plane for plane in spec.planes if not plane.name.endswith("_scale")]
    for layer in layers:
        for plane in vectors:
            for some in slots.split(1 << 16):
                x = torch.randn(len(some), *plane.shape, device=CUDA)
                write_vectors(layer, plane.name, some, x)
    return layers


def plain_of(layer: KVLayer) -> KVLayer:
    """Returns what is left of keys and values, in their own basis, as float32."""
    blocks = torch.arange(len(layer.key), device=CUDA)
    return KVLayer(
        **{
            name: mixed_as(layer, name, read_vectors(layer, name, blocks))
            for name in ("key", "value")
        }
    )


@cache
def tickets() -> torch.Tensor:
    """Of all launches here, as a back end has its own."""
    return make_tickets(CUDA)


def spec_of(name: str, K: int, D: int) -> KVSpec:
    kv = kv_formats(name)
    return attention_kv(K, D, kv.key, value_format=kv.value)


def op_of(H: int, K: int, D: int, rope: RopeTable | None = None) -> AttentionOp:
    return AttentionOp(
        num_heads=H,
        num_kv_heads=K,
        head_size=D,
        scale=D**-0.5,
        visibility=Full(),
        rope=rope,
        qk_norm=None,
    )


def report(case: str, name: str, floor_s: float, ms: float, base_ms: float | None) -> float:
    us, floor_us = ms * 1e3, floor_s * 1e6
    against = 1.0 if base_ms is None else ms / base_ms
    print(f"| {case} | {name} | {floor_us:.1f} | {us:.1f} | {us / floor_us:.2f} | {against:.3f} |")
    RESULTS.append(
        {"case": case, "format": name, "floor_us": floor_us, "us": us, "against_bf16": against}
    )
    return ms if base_ms is None else base_ms


RESULTS: list[dict[str, object]] = []


def queries(layer: KVLayer, count: int, H: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns queries, and what the layer's keys are to meet in their place."""
    q = torch.randn(count, H, D, device=CUDA)
    return q, mixed_as(layer, "key", q).bfloat16()


def check() -> None:
    """Decodes, short and long chunks, those of a step that is too large for graphs, prefixes."""
    lens = [1, 16, 65, 1023, 4097, 2600]
    steps = {
        "decode": [1] * 6,
        "chunks": [1, 5, 64, 65, 300, 1],
        "large": [1, 1, 40, 70, 1, 2400],
    }
    for H, K, D in ((32, 4, 128), (16, 16, 128), (8, 2, 64), (8, 4, 256)):
        num_blocks = sum(-(-n // BLOCK) for n in lens) + 5
        for name in FORMATS[1:]:
            layer = layers_of(spec_of(name, K, D), num_blocks, least=0)[1]
            plain, op = plain_of(layer), op_of(H, K, D)
            for form, query_lens in steps.items():
                batch = make_batch(lens, query_lens, num_blocks)
                q, mixed = queries(layer, sum(query_lens), H, D)
                expected = exact(q, plain, batch, None)
                found = attention(mixed, op, layer, batch, tickets=tickets())
                told(f"{form} {(H, K, D)} {name}", found, expected)
            batch = make_batch([2100] * 3, [1] * 3, num_blocks)
            batch.block_table[:, :128] = batch.block_table[0, :128]
            table, ones = batch.block_table.cpu().numpy(), torch.ones(3, dtype=torch.int32).numpy()
            plan = plan_shared_prefix(table, ones * 2100, ones, tiles_of(H, K))
            assert plan is not None
            q, mixed = queries(layer, 3, H, D)
            found = shared_prefix_attention(
                *(mixed, op, layer, batch, plan.to_device(CUDA), tickets())
            )
            told(f"shared {(H, K, D)} {name}", found, exact(q, plain, batch, None))


def told(case: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = norm_error(found, expected)
    print("ok" if error < 1.2e-2 else "WRONG", case, f"{error:.1e}", flush=True)


def decode() -> None:
    for model, (H, K, D) in MODELS.items():
        for size, context in ((16, 8192), (32, 1150), (1, 32768), (128, 700)):
            base = None
            num_blocks = size * -(-context // BLOCK) + 8
            for name in FORMATS:
                spec = spec_of(name, K, D)
                layers, op = layers_of(spec, num_blocks), op_of(H, K, D)
                batch = make_batch([context] * size, [1] * size, num_blocks)
                batch = replace(batch, plan=DevicePlan(max_query_len=1, num_short_tokens=0))
                q = torch.randn(size, H, D, device=CUDA).bfloat16()
                floor = (size * context * spec.token_bytes + 4 * q.numel()) / BYTES_PER_SECOND
                ms = graph_ms(
                    [partial(attention, q, op, layer, batch, tickets=tickets()) for layer in layers]
                )
                base = report(f"decode {model} {size} x {context}", name, floor, ms, base)


def prefill() -> None:
    for model, (H, K, D) in MODELS.items():
        for new, before in ((8192, 0), (4096, 28672)):
            base, total = None, new + before
            num_blocks = total // BLOCK + 8
            for name in FORMATS:
                layers, op = layers_of(spec_of(name, K, D), num_blocks)[:4], op_of(H, K, D)
                batch = make_batch([total], [new], num_blocks)
                bounds = DevicePlan(
                    max_query_len=new, max_seq_len=total, num_short_tokens=0, max_partials=0
                )
                batch = replace(batch, plan=bounds)
                q = torch.randn(new, H, D, device=CUDA).bfloat16()
                pairs = new * before + new * (new + 1) / 2
                floor = 4 * H * D * pairs / FLOPS_PER_SECOND
                ms = graph_ms(
                    [partial(attention, q, op, layer, batch, tickets=tickets()) for layer in layers]
                )
                base = report(f"prefill {model} {new} after {before}", name, floor, ms, base)


def write() -> None:
    for model, (H, K, D) in MODELS.items():
        for count in (16, 8192):
            base, num_blocks = None, count // BLOCK + 8
            angles = torch.randn(count + 1, D // 2, device=CUDA)
            rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=D)
            for name in FORMATS:
                spec, op = spec_of(name, K, D), op_of(H, K, D, rope)
                layers = layers_of(spec, num_blocks)
                qkv = torch.randn(count, (H + 2 * K) * D, device=CUDA).bfloat16()
                moved = count * (spec.token_bytes + 2 * (2 * H + 2 * K) * D)
                batch = make_batch([count], [count], num_blocks)
                calls = [partial(rope_and_cache, qkv, op, layer, batch) for layer in layers]
                ms = graph_ms(calls)
                base = report(f"write {model} {count}", name, moved / BYTES_PER_SECOND, ms, base)
    rows = torch.randn(16, 32, 128, device=CUDA).bfloat16()
    ms = graph_ms(list(repeat(partial(mix_rows, rows), 20)))
    report("mix 16 x 32 x 128", "int4", 4 * rows.numel() / BYTES_PER_SECOND, ms, None)


def latent_cases(
    size: int, context: int, H: int
) -> Iterator[tuple[str, float, Callable[[], None]]]:
    """Yields calls of DeepSeek-V2-Lite's absorbed decode, with their format and floor."""
    rank, rope, num_blocks = 512, 64, size * -(-context // BLOCK) + 8
    batch: AttentionBatch = make_batch([context] * size, [1] * size, num_blocks)
    q = torch.randn(size, H, rank + rope, device=CUDA).bfloat16()
    out = torch.empty(size, H, rank, device=CUDA, dtype=torch.bfloat16)
    for name in FORMATS[:4]:
        spec = latent_kv(rank, rope, kv_formats(name).key)
        floor = size * context * spec.token_bytes / BYTES_PER_SECOND
        for layer in islice(layers_of(spec, num_blocks, (rank, rope)), 8):
            plane = latent_plane(layer, rank, rope)
            call = partial(
                *(latent_decode, q, plane, batch, 0.1, out),
                max_seq_len=context,
                tickets=tickets(),
            )
            yield name, floor, call


def latent() -> None:
    for size, context, H in ((32, 4096, 16), (1, 131072, 16), (16, 8192, 128)):
        base, calls = None, list(latent_cases(size, context, H))
        for name in FORMATS[:4]:
            own = [call for one, _, call in calls if one == name]
            floor = next(floor for one, floor, _ in calls if one == name)
            ms = graph_ms(own)
            base = report(f"latent {size} x {context}, {H} heads", name, floor, ms, base)


def main() -> None:
    jobs = {"check": check, "decode": decode, "prefill": prefill, "write": write, "latent": latent}
    wanted, target = sys.argv[1:], None
    if "--json" in wanted:
        at = wanted.index("--json")
        target = wanted[at + 1]
        del wanted[at : at + 2]
    print(torch.__version__, torch.cuda.get_device_name())
    for name in wanted or list(jobs):
        print(f"== {name}: case, format, floor us, measured us, ratio, against bf16")
        jobs[name]()
    if target is not None:
        device = torch.cuda.get_device_name()
        with open(target, "w", encoding="utf-8") as file:
            for one in RESULTS:
                file.write(json.dumps(one | {"device": device, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
