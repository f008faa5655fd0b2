"""Reading and writing the planes of a KV layer in plain torch, whatever format they are in.

Called by the reference and by the ops that are composed of others. See `kv_codec` for the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.formats import KVFormat
from octavo.kernels.inputs import KVLayer
from octavo.kernels.kv_codec import dequantize, mix, quantize, stored_format


def format_of(layer: KVLayer, name: str) -> KVFormat:
    """Returns the format of plane `name`."""
    return stored_format(layer.planes[name])


def mixed_as(layer: KVLayer, name: str, x: Tensor, *, is_balanced: bool = False) -> Tensor:
    """Returns x [..., D] float32 in the basis of what plane `name` stores, or back from it.
    `is_balanced`: keys are divided by a factor (`KeyChange`)."""
    stored = format_of(layer, name)
    mixes_keys = stored.mixes_keys or (stored.is_quantized and is_balanced)
    if not (mixes_keys if name == "key" else stored.is_mixed):
        return x
    return _by_part(layer.parts, mix, x)


def write_vectors(
    layer: KVLayer,
    name: str,
    slots: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    *,
    is_balanced: bool = False,
) -> None:
    """Writes vectors x [T, ..., D] float32 to the slots int64 [T] of plane `name`; `scale`: see
    `quantize`; `is_balanced`: see `mixed_as`."""
    plane = layer.planes[name]
    block_size = plane.shape[1]
    at = slots // block_size, slots % block_size
    stored = format_of(layer, name)
    if not stored.is_quantized:
        plane[at] = x.to(plane.dtype)
        return
    mixed = mixed_as(layer, name, x, is_balanced=is_balanced)
    parts = _split(mixed, layer.parts)
    numbers, scales = zip(*(quantize(part, stored, scale) for part in parts), strict=True)
    plane.view(torch.uint8)[at] = torch.cat(numbers, dim=-1).view(torch.uint8)
    layer.planes[f"{name}_scale"][at] = torch.cat(scales, dim=-1)


def read_vectors(layer: KVLayer, name: str, blocks: Tensor) -> Tensor:
    """Returns float32 [*shape of blocks, P, ..., D]: what plane `name` has in these blocks, in the
    basis in which it is stored."""
    plane, stored = layer.planes[name], format_of(layer, name)
    if not stored.is_quantized:
        return plane[blocks].float()
    numbers = plane.view(torch.uint8)[blocks].view(plane.dtype)
    scales = layer.planes[f"{name}_scale"][blocks]
    if len(layer.parts) < 2:
        return dequantize(numbers, scales)
    sizes = [size * stored.bits // 8 for size in layer.parts]
    counts = [stored.num_scales(size) for size in layer.parts]
    parts = zip(numbers.split(sizes, -1), scales.split(counts, -1), strict=True)
    return torch.cat([dequantize(*part) for part in parts], dim=-1)


def _by_part(sizes: Sequence[int], change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parts = [change(part) for part in _split(x, sizes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return x.split(list(sizes), dim=-1) if len(sizes) > 1 else (x,)
