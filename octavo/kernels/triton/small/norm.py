"""RMSNorm, with and without the residual add.

Called by `backend.py`. A row's sum has one order, whatever the batch. Never touches the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn

MAX_COLUMNS = 16384
"""A row must fit the registers of one program."""


@triton.jit
def summed_row(x_at, residual_at, is_in, hidden_size, HAS_RESIDUAL: tl.constexpr,
               PARTS: tl.constexpr):  # fmt: skip
    """Returns float32 x, or residual + x, which then is stored there and rounded so. PARTS > 1: the
    numbers of x are sums of so many, rows of `hidden_size` apart, which are rounded first."""
    y = tl.load(x_at, mask=is_in, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        y += tl.load(x_at + part * hidden_size, mask=is_in, other=0.0).to(tl.float32)
    if PARTS > 1:
        y = y.to(x_at.dtype.element_ty).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_at, mask=is_in, other=0.0).to(tl.float32)
        rounded = y.to(residual_at.dtype.element_ty)
        tl.store(residual_at, rounded, mask=is_in)
        y = rounded.to(tl.float32)
    return y


@launchable
@triton.jit
def rms_norm_kernel(
    x_TM,
    residual_TM,
    weight_M,
    out_TM,
    hidden_size,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = y / sqrt(mean(y^2) + eps) * weight; y = x, or residual = residual + x in place.

    All [T, M], rows strided; float32 inside; y is the rounded residual that is stored. PARTS > 1:
    x [T, PARTS, M], contiguous but for rows, is added up in order and rounded first.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_in = column < hidden_size
    weight = tl.load(weight_M + column, mask=is_in, other=0.0).to(tl.float32)
    wait_turn(OVERLAP)
    announce(OVERLAP)
    x_at = x_TM + token * x_stride + column
    at = residual_TM + token * residual_stride + column
    y = summed_row(x_at, at, is_in, hidden_size, HAS_RESIDUAL, PARTS)
    mean = tl.sum(y * y, 0) / hidden_size
    normed = y * tl.rsqrt(mean + eps) * weight
    tl.store(out_TM + token * hidden_size + column, normed.to(out_TM.dtype.element_ty), mask=is_in)


def rms_norm(x_TM: Tensor, residual_TM: Tensor | None, weight_M: Tensor, eps: float) -> Tensor:
    """Returns the norm of x, or of residual += x (in place), in the dtype of x, which may be parts
    [T, S, M] that are added up."""
    num_tokens, hidden_size = len(x_TM), x_TM.shape[-1]
    assert weight_M.shape == (hidden_size,)
    assert hidden_size <= MAX_COLUMNS, (hidden_size, MAX_COLUMNS)
    assert num_tokens == 0 or hidden_size == 1 or x_TM.stride(-1) == 1
    assert x_TM.ndim == 2 or x_TM.is_contiguous()
    residual = x_TM if residual_TM is None else residual_TM
    assert residual.shape == (num_tokens, hidden_size)
    assert num_tokens == 0 or hidden_size == 1 or residual.stride(1) == 1
    out = torch.empty((num_tokens, hidden_size), dtype=x_TM.dtype, device=x_TM.device)
    if num_tokens:
        block = next_power_of_2(hidden_size)
        rms_norm_kernel[(num_tokens,)](
            x_TM,
            residual,
            weight_M,
            out,
            hidden_size,
            x_TM.stride(0),
            residual.stride(0),
            eps,
            HAS_RESIDUAL=residual_TM is not None,
            PARTS=x_TM.shape[1] if x_TM.ndim > 2 else 1,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            **launch_options(x_TM.device),
        )
    return out
