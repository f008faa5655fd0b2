"""What attention's kernels want to know of a layer: how scores are made, and who sees what.

Made once a launch from the layer's `AttentionOp`. Launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.inputs import AttentionOp
from octavo.kernels.triton.tiles.visible import CHUNK, FULL, WINDOW
from octavo.visibility import Chunk, Full, Visibility, Window

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Arguments and constants of a launch, the same for every kernel."""

    scale_log2: float
    """Scores times this are exponents of 2."""
    cap_log2: float
    reach: int
    """Size of the window or chunk."""
    sinks: Tensor
    visible: int

    has_cap: bool
    has_sinks: bool

    @property
    def arguments(self) -> tuple[float, float, int, Tensor]:
        """scale_log2, cap_log2, reach, sinks"""
        return self.scale_log2, self.cap_log2, self.reach, self.sinks

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"VISIBLE": self.visible, "HAS_CAP": self.has_cap, "HAS_SINKS": self.has_sinks}


def scores_of(op: AttentionOp, unused: Tensor) -> Scores:
    """Returns what a launch passes on; `unused` stands for sinks where there are none."""
    visible, reach = visible_of(op.visibility)
    return Scores(
        scale_log2=op.scale * LOG2_E,
        cap_log2=0.0 if op.soft_cap is None else op.soft_cap * LOG2_E,
        reach=reach,
        sinks=unused if op.sinks_H is None else op.sinks_H,
        visible=visible,
        has_cap=op.soft_cap is not None,
        has_sinks=op.sinks_H is not None,
    )


def plain_scores(scale: float, unused: Tensor) -> Scores:
    """Returns those of a layer that sees all, without sinks and soft cap."""
    return Scores(
        scale_log2=scale * LOG2_E,
        cap_log2=0.0,
        reach=0,
        sinks=unused,
        visible=FULL,
        has_cap=False,
        has_sinks=False,
    )


def visible_of(visibility: Visibility) -> tuple[int, int]:
    """Returns VISIBLE and reach."""
    match visibility:
        case Window(size):
            return WINDOW, size
        case Chunk(size):
            return CHUNK, size
        case Full():
            return FULL, 0


def most_visible(visibility: Visibility, num_tokens: int) -> int:
    """Returns how many of `num_tokens` tokens a query sees at most."""
    _, reach = visible_of(visibility)
    return min(num_tokens, reach) if reach else num_tokens
