"""Gated activations: act(gate) * up, and the gated addition of a shared expert.

Called by `backend.py` for dense MLPs and shared experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.launching.chip import cdiv
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.activation import activation_constant, gated

BLOCK = 1024


@launchable
@triton.jit
def activate_and_mul_kernel(
    both_TN,
    out_TF,
    inner_size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, f] = act(both[t, f], both[t, F + f]), computed in float32.

    both_TN [T, 2 F] contiguous; out_TF [T, F].
    """
    wait_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < inner_size
    at = both_TN + token * 2 * inner_size + column
    gate = tl.load(at, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(at + inner_size, mask=is_in, other=0.0).to(tl.float32)
    value = gated(gate, up, ACTIVATION)
    tl.store(out_TF + token * inner_size + column, value.to(out_TF.dtype.element_ty), mask=is_in)


def activate_and_mul(both_TN: Tensor, activation: Activation) -> Tensor:
    """Returns [T, F] from gate and up side by side [T, 2 F], in the same dtype."""
    num_tokens, columns = both_TN.shape
    assert columns % 2 == 0
    assert both_TN.is_contiguous()
    inner_size = columns // 2
    out = torch.empty((num_tokens, inner_size), dtype=both_TN.dtype, device=both_TN.device)
    if num_tokens:
        activate_and_mul_kernel[(num_tokens, cdiv(inner_size, BLOCK))](
            both_TN,
            out,
            inner_size,
            ACTIVATION=activation_constant(activation),
            BLOCK=BLOCK,
            num_warps=4,
            **launch_options(out.device),
        )
    return out


@launchable
@triton.jit
def add_gated_kernel(
    out_TM,
    x_TM,
    gate_T1,
    hidden_size,
    gate_stride,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] += sigmoid(gate[t]) * x[t], or += x[t] without a gate; float32 inside.

    out_TM and x_TM [T, M] contiguous; gate_T1 [T, 1] with a row stride.
    """
    wait_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < hidden_size
    at = token * hidden_size + column
    x = tl.load(x_TM + at, mask=is_in, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_T1 + token * gate_stride).to(tl.float32)
        x = x / (1.0 + tl.exp(-gate))
    total = tl.load(out_TM + at, mask=is_in, other=0.0).to(tl.float32) + x
    tl.store(out_TM + at, total.to(out_TM.dtype.element_ty), mask=is_in)


def add_gated(out_TM: Tensor, x_TM: Tensor, gate_T1: Tensor | None) -> None:
    """out += sigmoid(gate) * x in place, or out += x without a gate."""
    num_tokens, hidden_size = x_TM.shape
    assert out_TM.shape == x_TM.shape
    assert out_TM.is_contiguous()
    assert x_TM.is_contiguous()
    if num_tokens:
        add_gated_kernel[(num_tokens, cdiv(hidden_size, BLOCK))](
            out_TM,
            x_TM,
            x_TM if gate_T1 is None else gate_T1,
            hidden_size,
            0 if gate_T1 is None else gate_T1.stride(0),
            HAS_GATE=gate_T1 is not None,
            BLOCK=BLOCK,
            num_warps=4,
            **launch_options(out_TM.device),
        )
