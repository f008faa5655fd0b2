"""Gated activations: act(gate) * up.

Called by `ops.py` (dense MLPs) and inside the products of `moe.py`. Never allocates on its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.ops import Activation

BLOCK = 1024


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """silu(g) = g * sigmoid(g); gelu_tanh(g) = g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))."""
    if ACTIVATION == "silu":
        scaled = gate
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        scaled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-scaled))


@triton.jit
def activate_and_mul_kernel(
    both_TN, out_TF, inner_size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t, f] = act(both[t, f]) * both[t, F + f], computed in float32.

    both_TN [T, 2 F] contiguous; out_TF [T, F].
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < inner_size
    at = both_TN + token * 2 * inner_size + column
    gate = tl.load(at, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(at + inner_size, mask=is_in, other=0.0).to(tl.float32)
    value = activated(gate, ACTIVATION) * up
    tl.store(out_TF + token * inner_size + column, value.to(out_TF.dtype.element_ty), mask=is_in)


def activate_and_mul(both_TN: Tensor, activation: Activation) -> Tensor:
    """Returns [T, F] from gate and up side by side [T, 2 F], in the same dtype."""
    num_tokens, columns = both_TN.shape
    assert columns % 2 == 0
    assert both_TN.is_contiguous()
    inner_size = columns // 2
    out = torch.empty((num_tokens, inner_size), dtype=both_TN.dtype, device=both_TN.device)
    if num_tokens:
        activate_and_mul_kernel[(num_tokens, triton.cdiv(inner_size, BLOCK))](
            both_TN, out, inner_size, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
        )
    return out
