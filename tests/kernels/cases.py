"""Inputs of the kernel tests: weights in every format, paged KV with everything unused poisoned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from torch.nn import functional

from octavo.formats import FP8, NVFP4, PACKED_FORMATS, WEIGHT_FORMATS, WeightFormat
from octavo.kernels.activations import Activation, ClampedSwiGLU
from octavo.kernels.dequantize import dequantize_rows, gguf_table
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, QKNorm, RopeTable
from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import ExpertBiases, ExpertWeights, Router, Weight
from octavo.visibility import Full, Visibility, Window

NUMBER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SCALE_OFFSETS = {
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "nvfp4": (),
    "iq1_m": (),
    **dict.fromkeys(("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (0,)),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
"""Where the float16 scales of the formats that gguf cannot quantise to lie in a block."""


def plain_router(top_k: int, renormalize: bool = True) -> Router:
    """Returns the rule that softmax and top k are, for logits that are there already."""
    return Router(weights=(), rule=RoutingRule(top_k=top_k, renormalize=renormalize))


CLAMPED = ClampedSwiGLU(alpha=1.702, limit=1.5)


def exact_gate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Returns act(gate, up) of float64 tensors."""
    if isinstance(activation, ClampedSwiGLU):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(gate * activation.alpha) * (up + 1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def make_biases(rng: np.random.Generator, count: int, inner: int, hidden: int) -> ExpertBiases:
    return ExpertBiases(
        gate_EF=floats(rng, count, inner),
        up_EF=floats(rng, count, inner),
        down_EM=floats(rng, count, hidden),
    )


def make_weight(name: str, rows: int, cols: int, rng: np.random.Generator) -> Weight:
    """Returns a random matrix in format `name`, elements of about 1 / sqrt(cols)."""
    form = WEIGHT_FORMATS[name]
    values = rng.standard_normal((rows, cols), dtype=np.float32) / math.sqrt(cols)
    if not form.is_block:
        data = torch.from_numpy(values).to(NUMBER_DTYPES[name])
    elif name in ("mxfp4", "q8_0") or name.startswith(("q4_0", "q4_1", "q5_0", "q5_1")):
        data = torch.from_numpy(quantize(values, gguf.GGMLQuantizationType[name.upper()]))
    else:
        data = random_blocks(form, rows, cols, rng)
    table = torch.rand(256).mul_(0.02) if form is NVFP4 else gguf_table(form)
    return Weight(data=data, format=form, rows=rows, cols=cols, table=table)


def random_blocks(form: WeightFormat, rows: int, cols: int, rng: np.random.Generator) -> Tensor:
    """Returns random bytes whose scales are numbers of a sensible size."""
    num_blocks = -(-cols // form.block_size)
    blocks = rng.integers(0, 256, (rows, num_blocks, form.block_bytes), dtype=np.uint8)
    scales = torch.from_numpy(rng.uniform(1e-5, 1e-4, (rows, num_blocks, 1)).astype(np.float32))
    kind, own = form.name.rpartition("_")[2], form.name in PACKED_FORMATS
    dtype = NUMBER_DTYPES.get(kind, torch.float32) if own else torch.float16
    for offset in SCALE_OFFSETS.get(form.name, (0,) if own else ()):
        data = scales.to(dtype).view(torch.uint8).numpy()
        blocks[..., offset : offset + data.shape[-1]] = data
    if form.name == "iq1_m":  # four bits each in the high half of four words
        bits = scales.to(torch.float16).view(torch.int16).numpy().view(np.uint16)
        for word in range(4):
            high = (bits[..., 0] >> 4 * word & 15).astype(np.uint8) << 4
            blocks[..., 49 + 2 * word] = blocks[..., 49 + 2 * word] & 15 | high
    if form is FP8:
        codes = blocks[..., 4:]
        codes[codes & 0x7F == 0x7F] = 0x38  # no NaN
    return torch.from_numpy(blocks.reshape(rows, -1))


def exact(weight: Weight) -> Tensor:
    """Returns what `weight` means as float64, of gguf's formats by gguf's own dequantisation."""
    if not weight.format.is_block:
        return weight.data.double()
    if weight.format.name in PACKED_FORMATS or weight.format is NVFP4:
        return dequantize_rows(weight, slice(None)).double()
    kind = gguf.GGMLQuantizationType[weight.format.name.upper()]
    return torch.from_numpy(dequantize(weight.data.numpy(), kind)).double()


def floats(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Every element within `tolerance` of the largest expected one."""
    assert found.dtype is torch.float32
    assert found.shape == expected.shape
    worst = (found.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= tolerance * max(1.0, expected.abs().max().item()), worst


@dataclass(kw_only=True)
class PagedKV:
    """Sequences in a scattered arena, everything no token owns is NaN."""

    layer: KVLayer
    keys: list[Tensor]
    values: list[Tensor]
    table: Tensor
    block_size: int

    def batch(self, seq_lens: Sequence[int], query_lens: Sequence[int]) -> AttentionBatch:
        """The last `query_lens[s]` tokens of the first `seq_lens[s]` of every sequence."""
        spans = list(zip(seq_lens, query_lens, strict=True))
        positions = [torch.arange(n - q, n) for n, q in spans]
        slots = [
            self.table[s, p // self.block_size].long() * self.block_size + p % self.block_size
            for s, p in enumerate(positions)
        ]
        return AttentionBatch(
            positions_T=torch.cat(positions).to(torch.int32),
            slot_mapping_T=torch.cat(slots),
            query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
            seq_lens_S=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=self.table,
        )


def make_paged(
    rng: np.random.Generator,
    lengths: Sequence[int],
    heads_and_size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
) -> PagedKV:
    """Returns sequences of `lengths` written into shuffled blocks of a two-slot arena."""
    num_kv_heads, head_size = heads_and_size
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 3
    shape = (num_blocks, 2, 2, block_size, num_kv_heads, head_size)
    arena = torch.full(shape, math.nan, dtype=dtype)
    layer = KVLayer(key=arena[:, 1, 0], value=arena[:, 1, 1])
    free = torch.from_numpy(rng.permutation(num_blocks)).to(torch.int32)
    table = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[s, :count], free = free[:count], free[count:]
        at = torch.arange(length)
        block, offset = table[s, at // block_size].long(), at % block_size
        for pages, all_tokens in zip((layer.key, layer.value), kept, strict=True):
            tokens = floats(rng, length, num_kv_heads, head_size).to(dtype)
            pages[block, offset] = tokens
            all_tokens.append(tokens)
    keys, values = kept
    return PagedKV(layer=layer, keys=keys, values=values, table=table, block_size=block_size)


def attention_op(
    num_heads: int,
    layer: KVLayer,
    scale: float,
    visibility: Visibility | int | None = None,
    *,
    rope: RopeTable | None = None,
    qk_norm: QKNorm | None = None,
    sinks_H: Tensor | None = None,
    soft_cap: float | None = None,
) -> AttentionOp:
    """Returns what a layer asks; `visibility` may be the size of a window, or None for all."""
    if not isinstance(visibility, Visibility):
        visibility = Full() if visibility is None else Window(visibility)
    _, _, num_kv_heads, head_size = layer.key.shape
    return AttentionOp(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=scale,
        visibility=visibility,
        rope=rope,
        qk_norm=qk_norm,
        sinks_H=sinks_H,
        soft_cap=soft_cap,
    )


def exact_attention(
    q_THD: Tensor, paged: PagedKV, batch: AttentionBatch, op: AttentionOp
) -> Tensor:
    """Returns attention over whole score matrices in float64."""
    parts = []
    for s, (keys, values) in enumerate(zip(paged.keys, paged.values, strict=True)):
        rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
        seen = int(batch.seq_lens_S[s])
        group = q_THD.shape[1] // keys.shape[1]
        k = keys[:seen].double().repeat_interleave(group, 1)
        v = values[:seen].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q_THD[rows].double(), k) * op.scale
        if op.soft_cap is not None:
            scores = op.soft_cap * torch.tanh(scores / op.soft_cap)
        positions = batch.positions_T[rows].tolist()
        first = torch.tensor([op.visibility.first_visible(p) for p in positions]).view(-1, 1)
        query, key = batch.positions_T[rows].unsqueeze(1), torch.arange(seen)
        scores.masked_fill_((key > query) | (key < first), -math.inf)
        if op.sinks_H is not None:
            sinks = op.sinks_H.double().view(-1, 1, 1).expand(-1, len(positions), 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)[..., :seen]
        parts.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(parts)


def split_table(query_lens: list[int], lengths: list[int], size: int, queries: int) -> list[int]:
    """Returns `ShortPlan.table` (kernels/triton/attention/short_chunks.py) for splits of `size`
    tokens, tiles of so many queries, no window, and chunks of up to 64 queries."""
    parts = [
        -(-length // size) if 2 <= count <= 64 else 0
        for count, length in zip(query_lens, lengths, strict=True)
    ]
    both = list(zip(query_lens, parts, strict=True))
    pieces = [-(-count // queries) * n for count, n in both]
    slots = [count * n if n > 1 else 0 for count, n in both]
    merges = [count if n > 1 else 0 for count, n in both]
    sums = [[0, *np.cumsum(counts).tolist()] for counts in (pieces, slots, merges)]
    return [*sums[0], *sums[1], *sums[2], size]


def make_experts(rng: np.random.Generator, name: str, count: int, inner: int) -> ExpertWeights:
    return ExpertWeights(
        gate=tuple(make_weight(name, inner, 64, rng) for _ in range(count)),
        up=tuple(make_weight(name, inner, 64, rng) for _ in range(count)),
        down=tuple(make_weight(name, 64, inner, rng) for _ in range(count)),
    )
