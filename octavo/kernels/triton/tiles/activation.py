"""The activations of gated MLPs.

Called by every kernel that ends a gate product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """silu(g) = g * sigmoid(g); gelu_tanh(g) = g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))."""
    if ACTIVATION == "silu":
        scaled = gate
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        scaled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-scaled))
