"""The launch shapes of dense products, by the number of tokens and the size of the weight.

Asked by `tuning/shapes.py` where nothing was tuned, obeyed by the products. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

from octavo.kernels.triton.launching.chip import next_power_of_2

FEW_ROWS = 512
"""Of a weight: too few for all processors, unless they share its columns too."""


class ProductConstants(TypedDict):
    """What a product of several rows is launched with."""

    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    SPLITS: int
    TMA: bool
    EVEN_K: bool
    num_warps: int
    num_stages: int


class RowsConstants(TypedDict):
    """What a product of one row is launched with."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductShape:
    """The launch shape of a dense product."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    splits: int = 1
    """Parts of the sum, which change its bits."""

    def of_floats(self) -> ProductShape:
        """Returns the shape for float32: blocks of as many bytes."""
        return replace(self, block_k=self.block_k // 2)

    def in_one_order(self) -> ProductShape:
        """Returns the shape whose sums have the bits that every number of tokens gives."""
        return replace(self, splits=1)

    def constants(self, length: int) -> ProductConstants:
        """Returns the arguments of a launch whose sums have `length` numbers."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "SPLITS": self.splits,
            "TMA": self.tma,
            "EVEN_K": length % self.block_k == 0,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def product_shape(num_tokens: int, num_rows: int, *, can_tma: bool) -> ProductShape:
    """Returns the launch shape: measured on an H100, whose 227 KiB of shared memory it wants.

    Few tokens: columns narrow enough to give every multiprocessor work; a router's few rows are
    split. Bits depend on nothing else.
    """
    block_t = 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    splits = 4 if num_tokens <= 512 and num_rows <= FEW_ROWS else 1
    if splits > 1:
        block_n, block_k, num_stages = 16, 128, 6
    elif block_t < 64 and 2048 < num_rows <= 4096:
        block_n, block_k, num_stages = 32, 256, 4
    elif num_rows <= 2048:
        block_n, block_k, num_stages = (16, 256, 5) if block_t == 64 else (16, 512, 4)
    elif num_rows <= 4096 or (block_t == 16 and num_rows <= 16384):
        block_n, block_k, num_stages = 32, 128, 5
    elif num_rows > (8192 if block_t == 64 else 16384):
        block_n, block_k, num_stages = 128, 128, 4
    else:
        block_n, block_k, num_stages = 64, 128, 4
    if num_tokens > 64 and splits == 1:
        if -(-num_tokens // 128) * -(-num_rows // 128) >= 132:
            return ProductShape(
                block_t=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=can_tma
            )
        block_n, block_k, num_stages = 64, 128, 4
    return ProductShape(
        block_t=block_t,
        block_n=block_n,
        block_k=block_k,
        num_warps=4,
        num_stages=num_stages,
        tma=False,
        splits=splits,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsShape:
    """The launch shape of one kernel: rows of the weight a program, and a step along them."""

    block_n: int
    block_k: int
    num_warps: int

    def constants(self) -> RowsConstants:
        """Returns the arguments of a launch."""
        return {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "num_warps": self.num_warps}


def rows_shape(num_rows: int, hidden_size: int) -> RowsShape:
    """Returns the launch shape of a dense product, the best on an H100 for Qwen3 and Qwen1.5
    (benchmarks/kernels/decode.py): rows of one step on their own, longer ones by four."""
    is_long = hidden_size > 2048
    return RowsShape(
        block_n=4 if is_long else 1,
        block_k=step_of(hidden_size, 2048),
        num_warps=8 if is_long or num_rows <= 512 else 4,
    )


def norm_rows_shape(hidden_size: int) -> RowsShape:
    """Returns the launch shape: rows enough that norming the row again is little beside them."""
    block_k = max(8, next_power_of_2(hidden_size))
    return RowsShape(block_n=4, block_k=block_k, num_warps=8 if block_k > 2048 else 4)


def step_of(length: int, limit: int) -> int:
    """Returns how far along rows of `length` numbers one step goes."""
    return max(8, min(limit, next_power_of_2(length)))
