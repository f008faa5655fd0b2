"""The activations of gated MLPs.

Called by every kernel that ends a gate product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.activations import Activation, ClampedSwiGLU


def activation_constant(activation: Activation) -> str | tuple[float, float]:
    """Returns the ACTIVATION of kernels: a name, or alpha and limit of a clamped SwiGLU."""
    if isinstance(activation, ClampedSwiGLU):
        return activation.alpha, activation.limit
    return activation


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """silu(g) = g * sigmoid(g); gelu_tanh(g) = g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)), both
    times up; else `ClampedSwiGLU`."""
    if ACTIVATION == "silu":
        value = gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu_tanh":
        scaled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + tl.exp(-scaled)) * up
    else:
        # Comparisons, since a NaN must stay one.
        gate = tl.where(gate > ACTIVATION[1], ACTIVATION[1], gate)
        up = tl.where(up > ACTIVATION[1], ACTIVATION[1], up)
        up = tl.where(up < -ACTIVATION[1], -ACTIVATION[1], up)
        value = gate / (1.0 + tl.exp(-gate * ACTIVATION[0])) * (up + 1.0)
    return value
