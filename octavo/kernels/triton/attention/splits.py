"""How attention cuts keys into splits: as few as fill the processors in whole waves.

Asked by the plan of shared prefixes on the host; short_chunks.py counts the same way on the device.
Never looks at a device: what a piece costs is in tokens of it, as measured on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from octavo.kernels.triton.launching.chip import cdiv

TILE_ROWS = 128
"""Rows (queries times heads of a kv head) that one program attends at a time."""
LATENT_ROWS = 64
"""The same over latent vectors."""
SPLIT_STEP = 128
"""Splits have whole tiles of keys."""
PIECE_TOKENS = 256
"""A piece's queries, first scores and results take as long as so many tokens of its keys."""
PARTIALS_A_TOKEN = 64
"""So many partial results (of a row and head) are written and merged in the time that all
processors take for one token each."""


class Tiling(NamedTuple):
    """How many pieces a kernel makes of queries, and how many it does at a time."""

    num_heads: int
    stack: int
    """Heads of one kv head that are rows of one tile."""
    processors: int
    rows: int = TILE_ROWS

    @property
    def queries(self) -> int:
        """Queries of one tile."""
        return self.rows // self.stack

    @property
    def head_groups(self) -> int:
        """Pieces for every tile of queries and split of keys."""
        return self.num_heads // self.stack


@lru_cache
def tiling(num_heads: int, num_kv_heads: int, processors: int) -> Tiling:
    """Returns the tiling of Hopper's kernel, which the portable ones are near enough to."""
    group = num_heads // num_kv_heads
    return Tiling(num_heads, min(group & -group, TILE_ROWS // 2), processors)


@lru_cache
def latent_tiling(num_heads: int, processors: int) -> Tiling:
    """Returns the tiling of absorbed latent attention: its sums are long, so that tiles are low."""
    stack = min(num_heads & -num_heads, LATENT_ROWS)
    return Tiling(num_heads, stack, processors, LATENT_ROWS)


def cost(size: int, work: Sequence[tuple[int, int]], tiles: Tiling) -> float:
    """Returns about how long `work`, (keys, queries) that meet, takes in splits of `size`: in
    tokens of one piece. Work of one split leaves no partial results."""
    pieces = total = partials = 0
    for tokens, queries in work:
        tasks = cdiv(queries, tiles.queries) * tiles.head_groups
        parts = cdiv(tokens, size)
        pieces += tasks * parts
        total += tasks * tokens
        partials += queries * parts * tiles.num_heads if parts > 1 else 0
    longest = min(size, max(tokens for tokens, _ in work)) + PIECE_TOKENS
    waves = cdiv(pieces, tiles.processors) * longest
    # Where pieces are not equally long, who has had short ones does more of them.
    even = (total + pieces * PIECE_TOKENS) / tiles.processors + longest
    return min(waves, even) + partials / PARTIALS_A_TOKEN


@lru_cache
def split_size(
    work: tuple[tuple[int, int], ...], tiles: Tiling, *, most: int, shortest: int
) -> int:
    """Returns the tokens of a split: of 1 to `most` splits of the longest keys, none shorter than
    `shortest`, those that cost least, and of equals the longest."""
    longest = max(tokens for tokens, _ in work)
    sizes = [
        max(cdiv(longest, count * SPLIT_STEP) * SPLIT_STEP, shortest)
        for count in range(1, most + 1)
    ]
    return min(sizes, key=lambda size: cost(size, work, tiles))
