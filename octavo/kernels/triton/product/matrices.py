"""Weights as kernels take them: tensors of numbers, joined where they lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.cells import KEPT_BLOCKS
from octavo.kernels.dequantize import in_order
from octavo.kernels.planes import has_tile_scales
from octavo.kernels.triton.product.grids import unpack_blocks
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.weights import Together, Weight


def prepared(weights: Sequence[Weight]) -> Together:
    """Returns weights that are multiplied side by side, each and all of them with what kernels want
    to know of their values. Looks at them."""
    made = [_measured(one) for one in joined(weights)]
    return Together(
        weights=tuple(_measured(one) for one in weights), prepared=[*map(_matrix, made)]
    )


def matrices_of(weights: Sequence[Weight]) -> list[Tensor | Weight]:
    """Returns the weights as matrices of numbers, or packed ones, as few as they can be."""
    if isinstance(weights, Together):
        assert isinstance(weights.prepared, list)
        return weights.prepared
    return [_matrix(one) for one in joined(weights)]


def _matrix(weight: Weight) -> Tensor | Weight:
    is_kept = weight.planes is not None or weight.format.name in KEPT_BLOCKS
    return weight if is_kept else numbers_of(weight)


def _measured(weight: Weight) -> Weight:
    if weight.planes is None or weight.layout is None:
        return weight
    return replace(weight, is_by_tile=has_tile_scales(weight.planes, weight.layout))


def joined(weights: Sequence[Weight]) -> list[Weight]:
    """Joins weights that follow each other where they were placed, so that one product serves
    all."""
    made: list[Weight] = []
    for weight in weights:
        last, place = made[-1] if made else None, weight.within
        follows = (
            last is not None
            and last.within is not None
            and place is not None
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


def numbers_of(weight: Weight) -> Tensor:
    """Returns the matrix [rows, cols], unpacked where it is packed. Raises UnsupportedModelError
    for rows of blocks."""
    if weight.planes is not None:
        assert weight.layout is not None
        numbers = unpack(weight.planes, weight.layout, weight.cols, torch.bfloat16)
        return numbers if weight.order is None else in_order(numbers, weight.order)
    if weight.format.name in KEPT_BLOCKS:
        return unpack_blocks(weight, torch.bfloat16)
    if weight.format.is_block:
        raise UnsupportedModelError(
            f"weights in {weight.format.name} cannot be multiplied by the triton back end before "
            "they are laid out in planes (`DevicePlacement`)"
        )
    return weight.data
