"""What gated MLPs do with gate and up, as frozen data. No torch.

Part of a model's spec, given to the ops. Each says out = act(gate, up), element by element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PlainActivation = Literal["silu", "gelu_tanh"]
"""act(gate) * up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = up within -limit .. limit.

    Source: gpt-oss.
    """

    alpha: float
    limit: float


Activation = PlainActivation | ClampedSwiGLU
