"""The numbers that kernels multiply in."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def compute_type(x: Tensor, *weights: Tensor) -> tl.dtype:
    """Returns what the factors of a product become: themselves if alike, else float32."""
    is_same = all(weight.dtype == x.dtype for weight in weights)
    return TL_DTYPES[x.dtype] if is_same else tl.float32
