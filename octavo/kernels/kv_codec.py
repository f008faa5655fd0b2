"""How vectors of the KV cache become numbers and scales, and back: the specification of what
kernels do in registers.

Called by `reference.py` and by tests. Knows one vector of a token (a head's key or value, or one of
the two parts of a latent vector) and nothing of pages.

    fp8    numbers e4m3, scale = largest / 448             x = number * scale
    int8   numbers -127..127, scale = largest / 127        x = number * scale
    int4   numbers 0..15, scale = largest / 7.5            x = (number - 7.5) * scale

The largest is that of |x| over the numbers that share a scale. Scales are rounded to bfloat16
before anything is divided by them. int4 has no 0 but as many steps up as down: what `mix` makes of
one large number are numbers of both signs that are almost as large as each other. Vectors of int4
go through `mix` first, and so do the queries that meet such keys; sums of such values go through it
afterwards. Once its numbers are rounded, the scales of an int4 vector are multiplied by
|x|^2 / (x . x'), x' what was stored: so x' is as long along x as x is, and scores of the queries
that look for it are right in the mean (DRIVE, arXiv 2105.08339).
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.formats import KV_FORMATS, PACKED_BLOCK, KVFormat

MAX_MIXED = 128
"""Numbers that one Hadamard matrix mixes at most."""
LEAST_ALONG = 1e-30
"""Dot products that are smaller have lost bits, and lengthen nothing."""
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.5}
_FORMATS = {torch.float8_e4m3fn: "fp8", torch.int8: "int8", torch.uint8: "int4"}


def stored_format(numbers: Tensor) -> KVFormat:
    """Returns the format of a plane of numbers."""
    name = _FORMATS.get(numbers.dtype) or str(numbers.dtype).removeprefix("torch.")
    return KV_FORMATS[name]


def mixed_size(size: int) -> int:
    """Returns how many numbers of a vector of `size` are mixed at a time: the largest power of two
    that divides it, up to MAX_MIXED."""
    return min(size & -size, MAX_MIXED)


def mix(x: Tensor) -> Tensor:
    """Returns x [..., D] float32 times H / sqrt(n), the Hadamard matrix of n = `mixed_size(D)`, n
    numbers at a time.

    H[i, j] is -1 to the number of bits that i and j have in common; the product is its own inverse
    and keeps dot products. It spreads what is large in one place over all of them (QuaRot, arXiv
    2404.00456).
    """
    size = mixed_size(x.shape[-1])
    y = x.reshape(-1, size)
    half = 1
    while half < size:
        low, high = y.view(-1, size // (2 * half), 2, half).unbind(2)
        y = torch.stack((low + high, low - high), dim=2).view(-1, size)
        half *= 2
    return (y * size**-0.5).view(x.shape)


def quantize(x: Tensor, format: KVFormat, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the numbers of x [..., D] float32 as they lie in memory ([..., D], int4 [..., D / 2]
    bytes) and their scales bfloat16 [..., G]; int4 takes what `mix` made.

    With `scale` (broadcast to [..., G]) that is what all numbers are divided by, and what is beyond
    is clamped. A vector of zeros has scale 0; NaN and infinities make a NaN of every number that
    shares their scale.
    """
    num_scales = format.num_scales(x.shape[-1])
    groups = x.reshape(*x.shape[:-1], num_scales, -1)
    if scale is None:
        scale = groups.abs().amax(-1) / _LARGEST[format.name]
    scale = scale + (groups * 0).sum(-1)  # NaN where a number is not finite
    scales = scale.to(torch.bfloat16).expand(groups.shape[:-1])
    divisor = scales.float().unsqueeze(-1)
    steps = torch.where(divisor == 0, 0.0, groups / divisor)
    if format.name == "fp8":
        numbers = steps.clamp(-448, 448).to(torch.float8_e4m3fn)
    elif format.name == "int8":
        numbers = steps.nan_to_num(0).round().clamp(-127, 127).to(torch.int8)
    else:
        numbers = (steps.nan_to_num(0) + 7.5).round().clamp(0, 15)
        scales = _lengthened(scales, groups, (numbers - 7.5) * divisor)
        return _packed(numbers.to(torch.uint8).reshape(x.shape)), scales
    return numbers.reshape(x.shape), scales.contiguous()


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """Returns the float32 vectors [..., D] that `quantize` made these of; of int4, what `mix`
    made."""
    is_packed = numbers.dtype is torch.uint8
    values = _unpacked(numbers).float() - 7.5 if is_packed else numbers.float()
    groups = values.reshape(*scales.shape, -1)
    return (groups * scales.float().unsqueeze(-1)).reshape(values.shape)


def _lengthened(scales: Tensor, groups: Tensor, stored: Tensor) -> Tensor:
    """Returns the scales [..., G] with which `stored` [..., G, N] is as long as the vector of
    `groups` along that vector; as they are where there is no such factor."""
    along, square = (groups * stored).sum((-2, -1)), groups.square().sum((-2, -1))
    is_sound = (along > LEAST_ALONG) & (along + square < torch.inf)
    factor = torch.where(is_sound, square / along, 1.0)
    return (scales.float() * factor.unsqueeze(-1)).to(torch.bfloat16)


def _packed(numbers: Tensor) -> Tensor:
    """Returns two numbers a byte; see PACKED_BLOCK."""
    low, high = numbers.reshape(*numbers.shape[:-1], -1, 2, PACKED_BLOCK // 2).unbind(-2)
    return (low | high << 4).flatten(-2)


def _unpacked(data: Tensor) -> Tensor:
    blocks = data.reshape(*data.shape[:-1], -1, PACKED_BLOCK // 2)
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)
