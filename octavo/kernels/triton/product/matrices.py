"""Weights as kernels take them: tensors of numbers, joined where they lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.planes import has_tile_scales
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.weights import Weight


def joined(weights: Sequence[Weight]) -> list[Weight]:
    """Joins packed weights that follow each other where they were placed, so that one product
    serves all."""
    made: list[Weight] = []
    for weight in weights:
        last, place = made[-1] if made else None, weight.within
        follows = (
            last is not None
            and last.within is not None
            and place is not None
            and weight.planes is not None
            and place.whole is last.within.whole
            and place.start == last.within.start + last.rows
        )
        if follows:
            assert last is not None
            assert last.within is not None
            assert place is not None
            start, whole = last.within.start, place.whole
            part = whole.part(start, place.start + weight.rows)
            made[-1] = replace(part, within=last.within)
        else:
            made.append(weight)
    return made


def matrices_of(weights: Sequence[Weight]) -> list[Tensor | Weight]:
    """Returns weights that are multiplied side by side as numbers or packed, as few as they can
    be, and how FP8 has its scales. Looks at values: once for each."""
    if all(weight.planes is None for weight in weights):
        return [*merged_matrices([numbers_of(weight) for weight in weights])]
    return [_packed(one) or numbers_of(one) for one in joined(weights)]


def _packed(weight: Weight) -> Weight | None:
    if weight.planes is None or weight.layout is None:
        return None
    return replace(weight, is_by_tile=has_tile_scales(weight.planes, weight.layout))


def numbers_of(weight: Weight) -> Tensor:
    """Returns the matrix [rows, cols], unpacked where it is packed. Raises UnsupportedModelError
    for rows of blocks."""
    if weight.planes is not None:
        assert weight.layout is not None
        return unpack(weight.planes, weight.layout, weight.cols, torch.bfloat16)
    if weight.format.is_block:
        raise UnsupportedModelError(
            f"weights in {weight.format.name} cannot be multiplied by the triton back end before "
            "they are laid out in planes (`DevicePlacement`)"
        )
    return weight.data


def merged_matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Joins matrices that follow each other in one storage, so that one product serves all."""
    merged = tensors[:1]
    for tensor in tensors[1:]:
        last = merged[-1]
        follows = (
            tensor.dtype == last.dtype
            and last.is_contiguous()
            and tensor.is_contiguous()
            and tensor.shape[1] == last.shape[1]
            and tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and tensor.storage_offset() == last.storage_offset() + last.numel()
        )
        if follows:
            rows = len(last) + len(tensor)
            merged[-1] = last.as_strided((rows, last.shape[1]), last.stride())
        else:
            merged.append(tensor)
    return merged
