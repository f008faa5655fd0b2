"""Which tokens go to which experts, as the products of a layer are told.

Made by `grouped.py`, once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from octavo.kernels.triton.experts.shapes import TileShape
from octavo.kernels.triton.experts.sort import SortedPairs
from octavo.kernels.triton.launching.chip import cdiv

FEW_TOKENS = 64
FEW_PAIRS = 1024
"""Beyond, each program would look through too many."""
SHARED_TOKENS = 64
"""A shared expert's rows are all tokens: with more they would take longer than the others'."""
SHARED_ROWS = 32
"""Of a tile at most."""
PAIRS_TILE = 256


def is_few(topk_ids: Tensor) -> bool:
    """Whether pairs are so few that every program looks through all of them."""
    return len(topk_ids) <= FEW_TOKENS and topk_ids.numel() <= FEW_PAIRS


class RowsConstants(TypedDict):
    """How programs find their rows: constants of both kernels."""

    ROWS_FROM: str
    TOP_K: int
    SHARED: int
    SHARED_ROWS: int
    ROWS: int
    HALVES: bool
    TILE: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dispatch:
    """Which tokens go to which experts, for the two products of a layer."""

    topk_ids: Tensor
    pairs: SortedPairs | None
    """None: every program looks through all pairs."""
    num_experts: int
    num_shared: int
    """Parts of a shared expert, which run beside the experts."""
    rows: int
    """Of a tile."""

    @property
    def num_rows(self) -> int:
        """Rows of hidden and of parts."""
        num_tokens, top_k = self.topk_ids.shape
        return num_tokens * (top_k + self.num_shared)

    def grid(self, columns: int, shape: TileShape) -> tuple[int]:
        """Returns how many programs make `columns` of every row."""
        owners = self.num_experts + self.num_shared
        if self.pairs is not None:
            of_shared = self.num_shared * cdiv(len(self.topk_ids), self.rows)
            owners = self.pairs.blocks_3B.shape[1] + of_shared
        return (owners * cdiv(columns, shape.block_n),)

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Returns ids, order, blocks and the counts."""
        num_tokens = len(self.topk_ids)
        if self.pairs is None:
            return *[self.topk_ids] * 3, num_tokens, 0, self.num_experts
        blocks = self.pairs.blocks_3B
        ordered = self.topk_ids, self.pairs.order_P, blocks
        return *ordered, num_tokens, blocks.shape[1], self.num_experts

    def constants(self) -> RowsConstants:
        is_large = self.num_shared > 0 and len(self.topk_ids) > 16
        shared_rows = SHARED_ROWS if is_large else 16
        return {
            "ROWS_FROM": "scan" if self.pairs is None else "order",
            "TOP_K": self.topk_ids.shape[1],
            "SHARED": self.num_shared,
            # One value where nobody reads it, as every value is a binary.
            "SHARED_ROWS": shared_rows if self.pairs is None else self.rows,
            "ROWS": self.rows,
            "HALVES": self.pairs is not None and self.rows >= 128,
            "TILE": PAIRS_TILE,
        }
