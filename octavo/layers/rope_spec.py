"""What positions do to queries and keys, as frozen data: rotary embedding and temperature.

Part of a ModelSpec, turned into a table by `layers.rope`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "proportional"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of a layer. Fields that `type` does not use keep their default."""

    type: RopeType
    theta: float
    rotary_dim: int
    original_max_position_embeddings: int
    """Length the model was trained on before `factor` stretched it."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    score_factor: float = 1.0
    """Multiplies the scores of latent attention (yarn with mscale_all_dim)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions."""
    proportion: float = 1.0
    """proportional: the share of the pairs that is rotated; the others keep still."""
    pairs_neighbours: bool = False
    """The checkpoint pairs neighbours, rows 2 i and 2 i + 1 of a head, and not i and i + half."""

    def stretched_len(self, max_position_embeddings: int) -> int:
        """Returns the longest text that the embedding is made for: `max_position_embeddings`, or
        what the factor stretches it to. llama3 counts its factor in already."""
        if self.type in ("linear", "dynamic"):
            return int(max_position_embeddings * max(self.factor, 1.0))
        if self.type == "yarn":
            stretched = int(self.original_max_position_embeddings * self.factor)
            return max(max_position_embeddings, stretched)
        return max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + scale * ln(1 + floor((p + 1) / floor)).

    Source: Llama 4, after arXiv 2501.19399."""

    floor: int
    scale: float
