"""Codes and scales as they are published, to the rows of blocks that our kernels read.

Called by `ints` and `floats`. Every function returns uint8 [rows, row bytes] of a format of
`octavo.formats`, whose values are bit for bit those of the published format.
N rows, K columns, G groups of columns that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.formats import FP8, NVFP4, WeightFormat
from octavo.formats import GROUP as SUB


def unpack_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns `count` codes (uint8) a row of int32 words [R, W]: a little-endian stream of bits."""
    if 8 % bits == 0:  # none crosses a byte
        octets = words.contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (octets[..., None] >> shifts) & (1 << bits) - 1
        return codes.flatten(-2)[..., :count]
    wide = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // 32, first % 32
    following = torch.cat((wide, torch.zeros_like(wide[..., :1])), dim=-1)[..., word + 1]
    pair = wide[..., word] >> shift | following << 32 - shift
    return (pair & (1 << bits) - 1).to(torch.uint8)


def int4_rows(codes: Tensor, scales: Tensor, zeros: Tensor, form: WeightFormat) -> Tensor:
    """codes [N, K] below 16, scales [N, blocks] in the format's type, zeros uint8 [N, blocks]."""
    blocks = _blocks(codes, form)
    halves = blocks.unflatten(-1, (-1, 2, SUB // 2))
    packed = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)
    parts = (_bytes(scales[..., None]), zeros[..., None], packed)
    return torch.cat(parts, dim=-1).flatten(1)


def int8_rows(codes: Tensor, scales: Tensor, zeros: Tensor, form: WeightFormat) -> Tensor:
    """codes uint8 [N, K], scales float32 [N, blocks], zeros uint8 [N, blocks]."""
    parts = (_bytes(scales.float()[..., None]), zeros[..., None], _blocks(codes, form))
    return torch.cat(parts, dim=-1).flatten(1)


def fp8_rows(numbers: Tensor, scales: Tensor) -> Tensor:
    """numbers e4m3 [N, K], scales float32 [N, blocks]."""
    parts = (_bytes(scales[..., None]), _blocks(numbers.view(torch.uint8), FP8))
    return torch.cat(parts, dim=-1).flatten(1)


def mxfp4_rows(pairs: Tensor, exponents: Tensor) -> Tensor:
    """pairs uint8 [N, K / 2], the even column low; exponents uint8 [N, K / 32]."""
    halves = _codes(pairs).unflatten(-1, (-1, 2, SUB // 2))
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    return torch.cat((exponents[..., None], packed), dim=-1).flatten(1)


def nvfp4_rows(pairs: Tensor, scales: Tensor) -> Tensor:
    """pairs uint8 [N, K / 2], the even column low; scales e4m3 [N, K / 16]."""
    codes = _blocks(_codes(pairs), NVFP4).unflatten(-1, (4, 2, 8))
    packed = (codes[..., 0, :] | codes[..., 1, :] << 4).flatten(-2)
    whole = packed.new_zeros(len(scales), packed.shape[1] * 4)
    whole[:, : scales.shape[1]] = scales.view(torch.uint8)
    return torch.cat((whole.unflatten(-1, (-1, 4)), packed), dim=-1).flatten(1)


def _codes(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def _blocks(codes: Tensor, form: WeightFormat) -> Tensor:
    """Returns [N, blocks, block size], the last block of a row filled up with zeros."""
    rows, cols = codes.shape
    missing = -cols % form.block_size
    if missing:
        codes = torch.cat((codes, codes.new_zeros(rows, missing)), dim=1)
    return codes.view(rows, -1, form.block_size)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)
