"""The planes of a layer's keys and values, as kernels are launched on them.

Made once a launch by every launcher of this folder; latent/pages.py is its like. Checks that pages
lie as the kernels think. Launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionBatch, KVLayer
from octavo.kernels.kv_codec import stored_format

NUMBERS = "numbers"
"""FORMAT of planes without scales."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVPlanes:
    """Arguments and constants of a launch, the same for every kernel."""

    arguments: tuple[Tensor | int, ...]
    """The planes of keys and of values, each: numbers, scales, the elements between their pages."""
    key_format: str
    value_format: str
    num_heads: int
    head_size: int
    block_size: int
    value_delta: int
    """Elements from a key to its value where they are neighbours in the arena's page (their
    alignment is then the same), else 0."""
    dtype: torch.dtype
    """What products are made in: 16 bits where queries have them and so have numbers without
    scales, else float32."""

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are numbers without scales."""
        return self.key_format == self.value_format == NUMBERS

    @property
    def constants(self) -> dict[str, str | int]:
        return {
            "KEY": self.key_format,
            "VALUE": self.value_format,
            "K": self.num_heads,
            "D": self.head_size,
            "P": self.block_size,
        }


def planes_of(q_THD: Tensor, layer: KVLayer, batch: AttentionBatch) -> KVPlanes:
    """Returns the planes that the queries [T, H, D] meet, after checking that they do."""
    num_heads, head_size = q_THD.shape[1:]
    block_size, num_kv_heads = layer.key.shape[1:3]
    if num_heads % num_kv_heads or head_size > 256:
        raise ValueError(
            f"{num_heads} query heads of size {head_size} do not fit {num_kv_heads} kv heads (a "
            "multiple of them, size at most 256)"
        )
    if not q_THD.is_contiguous() or batch.block_table.stride(1) != 1:
        raise ValueError("queries and block table rows must be contiguous")
    formats, arguments = [], []
    for name in ("key", "value"):
        one, format = _plane(layer, name, head_size)
        formats.append(format)
        arguments.extend(one)
    numbers = {plane.dtype for plane in (layer.key, layer.value)}
    is_same = all(
        format != NUMBERS or plane.dtype == q_THD.dtype
        for format, plane in zip(formats, (layer.key, layer.value), strict=True)
    )
    if formats == [NUMBERS, NUMBERS] and len(numbers) > 1:
        raise ValueError("keys and values must have one dtype")
    if formats[0] == formats[1] and arguments[2:4] != arguments[6:8]:
        raise ValueError("keys and values must lie in one arena")
    return KVPlanes(
        arguments=tuple(arguments),
        key_format=formats[0],
        value_format=formats[1],
        num_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        value_delta=_value_delta(layer),
        dtype=q_THD.dtype if is_same else torch.float32,
    )


def _plane(layer: KVLayer, name: str, head_size: int) -> tuple[tuple[Tensor | int, ...], str]:
    """Returns numbers, scales and the elements between their pages; and the FORMAT."""
    numbers, scales = layer.planes[name], layer.planes.get(f"{name}_scale")
    if scales is None:
        check_pages(name, numbers, head_size)
        return (numbers, numbers, numbers.stride(0), 0), NUMBERS
    stored = stored_format(numbers)
    check_pages(name, numbers, head_size * stored.bits // 8)
    check_pages(f"{name}_scale", scales, stored.num_scales(head_size))
    return (numbers, scales, numbers.stride(0), scales.stride(0)), stored.name


def check_pages(name: str, pages: Tensor, width: int) -> None:
    """Raises ValueError unless pages are [B, P, K, width], each in one piece."""
    _, block_size, num_heads, columns = pages.shape
    if columns != width or pages.stride()[1:] != (num_heads * width, width, 1):
        raise ValueError(
            f"{name} pages must be views [B, {block_size}, {num_heads}, {width}] with contiguous "
            f"pages, got shape {tuple(pages.shape)}, strides {pages.stride()}"
        )


def _value_delta(layer: KVLayer) -> int:
    key, value = layer.key, layer.value
    page, apart = key[0].numel(), value.data_ptr() - key.data_ptr()
    is_one = key.dtype == value.dtype and key.stride(0) == value.stride(0)
    is_next = apart == page * key.element_size() and apart % 16 == 0
    return page if is_one and is_next else 0


def is_plain(layer: KVLayer) -> bool:
    """Whether keys and values are numbers without scales."""
    return layer.key_scale is None and layer.value_scale is None
