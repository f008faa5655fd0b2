"""Quantised matrices as public tools write them, with what they mean by the formats' own rules.

Packed bit by bit from the formats' descriptions, without the code that reads them; what
compressed-tensors writes is written by that library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies in nibble i of a word (AutoAWQ, gemm)."""


@dataclass(frozen=True)
class Written:
    """One matrix [N, K]: its tensors by the last part of their names, and its float32 values."""

    tensors: dict[str, Tensor]
    values: Tensor


def integers(
    rng: np.random.Generator, rows: int, cols: int, group: int, bits: int, scale_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns random codes [N, K], zeros [N, G], scales [N, G], and the values they mean."""
    groups = -(-cols // group)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (rows, cols)))
    zeros = torch.from_numpy(rng.integers(1, 1 << bits, (rows, groups)))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, groups))).to(scale_type)
    of = torch.arange(cols) // group
    return codes, zeros, scales, (codes - zeros[:, of]).float() * scales.float()[:, of]


def words_of(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Packs codes into int32 words along `dim`: a little-endian stream of bits."""
    array = codes.movedim(dim, -1).numpy().astype(np.uint64)
    stream = (array[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    stream = stream.reshape(*array.shape[:-1], -1).astype(np.uint8)
    missing = -stream.shape[-1] % 32
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    packed = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return torch.from_numpy(packed.copy()).movedim(-1, dim).contiguous()


def awq(rng: np.random.Generator, rows: int, cols: int, group: int) -> Written:
    codes, zeros, scales, values = integers(rng, rows, cols, group, 4, torch.float16)

    def packed(table: Tensor) -> Tensor:
        eights = table.T.reshape(table.shape[1], -1, 8)[:, :, list(AWQ_ORDER)]
        return words_of(eights.flatten(1), 4, 1)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T.contiguous()}
    return Written(tensors, values)


def gptq(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    group: int,
    bits: int,
    *,
    less_one: bool = False,
    reordered: bool = False,
    uneven: bool = False,
) -> Written:
    codes, zeros, scales, values = integers(rng, rows, cols, group, bits, torch.float16)
    of = torch.arange(cols) // group
    if reordered:
        of = torch.from_numpy(rng.permutation(of.numpy()))
        if uneven:
            of[0] = (of[0] + 1) % (int(of.max()) + 1)
        values = (codes - zeros[:, of]).float() * scales.float()[:, of]
    if bits == 3:
        packed_zeros = words_of((zeros - int(less_one)).T, bits, 1)
    else:  # gptqmodel counts whole words down: a zero of 0 borrows from the next field
        zeros[::3] = 0
        values = (codes - zeros[:, of]).float() * scales.float()[:, of]
        ones = sum(1 << place for place in range(0, 32, bits)) * less_one
        packed_zeros = (words_of(zeros.T, bits, 1).long() - ones).to(torch.int32)
    tensors = {
        "qweight": words_of(codes.T, bits, 0),
        "qzeros": packed_zeros,
        "scales": scales.T.contiguous(),
        "g_idx": of.int(),
    }
    return Written(tensors, values)


def compressed(rng: np.random.Generator, rows: int, cols: int, kind: str, **args: Any) -> Written:
    """What compressed-tensors makes of a random matrix, and what it makes of that again."""
    weight = torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32)) / cols**0.5
    if kind == "pack-quantized":
        weight = weight.bfloat16()
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=kind)
    low, high = _ranges(weight, weights)
    state = {"weight": weight}
    more = {}
    if kind == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        more = {"global_scale": state["weight_global_scale"]}
    state["weight_scale"], zeros = calculate_qparams(low, high, weights, **more)
    if not weights.symmetric:
        state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(kind)
    packed = compressor.compress(dict(state), scheme)
    exact = {
        name: tensor.float() if name == "weight_scale" and tensor.dtype != torch.uint8 else tensor
        for name, tensor in packed.items()
    }
    values = compressor.decompress(exact, scheme)["weight"].float()
    if kind == "nvfp4-pack-quantized":
        rounded, values = values, nvfp4_values(packed)
        assert torch.equal(values.bfloat16().float(), rounded)  # the library has no float32
    return Written({name: tensor.contiguous() for name, tensor in packed.items()}, values)


def nvfp4_values(packed: dict[str, Tensor]) -> Tensor:
    """e2m1 * (scale / global scale), the even column in the low half of a byte."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat((numbers, -numbers))
    pairs = packed["weight_packed"].int()
    codes = torch.stack((pairs % 16, pairs // 16), dim=-1).flatten(1)
    scales = packed["weight_scale"].float() / packed["weight_global_scale"].float()
    return numbers[codes] * scales.repeat_interleave(16, dim=1)


def _ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Returns the least and largest number of what shares a scale."""
    rows, cols = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        height, width = args.block_structure or (128, 128)
        padded = torch.zeros(-(-rows // height) * height, -(-cols // width) * width)
        padded[:rows, :cols] = weight
        blocks = padded.view(len(padded) // height, height, -1, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(rows, -1, args.group_size if args.group_size else cols)
    return groups.amin(-1), groups.amax(-1)


def fp8(
    rng: np.random.Generator, rows: int, cols: int, block: tuple[int, int], scale_type: torch.dtype
) -> Written:
    """transformers' and DeepSeek's layout: `weight_scale_inv` multiplies."""
    numbers = torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32)) * 40
    numbers = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = -(-rows // block[0]), -(-cols // block[1])
    scales = torch.from_numpy(rng.uniform(1e-4, 1e-3, shape)).to(scale_type)
    wide = scales.float()[torch.arange(rows) // block[0]][:, torch.arange(cols) // block[1]]
    return Written({"weight": numbers, "weight_scale_inv": scales}, numbers.float() * wide)
