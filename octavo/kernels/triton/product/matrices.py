"""Weights as kernels take them: tensors of numbers, joined where they lie side by side."""

from __future__ import annotations

from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.weights import Weight


def numbers_of(weight: Weight) -> Tensor:
    """Returns the matrix [rows, cols]. Raises UnsupportedModelError for block formats."""
    if weight.format.is_block:
        raise UnsupportedModelError(
            f"weights in {weight.format.name} cannot be multiplied by the triton back end: GGUF "
            "block formats need the CPU back end for now (bf16, f16 and f32 run here)"
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
