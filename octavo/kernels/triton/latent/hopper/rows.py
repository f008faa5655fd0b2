"""Single queries on Hopper: what both kernels of them are given, and which share a program has.

Used by lone.py and few_heads.py. Never attends.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.triton.attention.hopper.shares import share_of
from octavo.kernels.triton.attention.partials import Partials
from octavo.kernels.triton.attention.scores import LOG2_E
from octavo.kernels.triton.latent.hopper.tiles import TILE, described
from octavo.kernels.triton.latent.pages import LatentPlane
from octavo.kernels.triton.launching.chip import num_processors

UNSPECIALISED = ["num_partials", "stride_table"]


@gluon.jit
def own_share(
    query_starts, seq_lens, shared_tokens, shared_partials, num_partials, tickets, block_table,
    stride_table, H: gl.constexpr, GROUP: gl.constexpr, HAS_SHARED: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Returns place and work of `share_of`, the place of the first partial result of the first of
    GROUP heads, the program's ticket and the sequence's row of the block table."""
    place, work = share_of(
        query_starts, seq_lens, shared_tokens, shared_partials, GROUP, HAS_SHARED, BLOCK_N
    )
    _, sequence, heads, _, _, _ = place
    firsts = (sequence * H + heads) * num_partials
    ticket = tickets + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    return place, work, firsts, ticket, block_table + sequence * stride_table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoneRows:
    """The sequences with one query of a step and a layer, as `latent_decode` has them."""

    q_THC: Tensor
    plane: LatentPlane
    batch: AttentionBatch
    scale: float
    out_THR: Tensor
    partials: Partials
    tickets: Tensor
    shared: tuple[Tensor, Tensor] | None
    most_shares: int
    """Partial results that a row has room for, beside what it shares."""

    @property
    def num_heads(self) -> int:
        return self.q_THC.shape[1]

    @property
    def num_rows(self) -> int:
        return len(self.batch.seq_lens_S)

    @property
    def processors(self) -> int:
        return num_processors(self.q_THC.device)

    def grid(self, groups: int) -> tuple[int, int, int]:
        """Returns groups of heads, rows, and programs that share a row's keys: as many as run at
        the same time."""
        pieces = self.num_rows * groups
        assert pieces <= len(self.tickets), (self.num_rows, groups)
        return groups, self.num_rows, min(self.most_shares, max(1, self.processors // pieces))

    @property
    def arguments(self) -> tuple[Tensor | TensorDescriptor | int | float, ...]:
        """Queries, pages, results, and all else up to the scale."""
        batch, partials, unused = self.batch, self.partials, self.batch.seq_lens_S
        return (
            *(self.q_THC, described(self.plane), self.out_THR, partials.out, partials.lse),
            *(batch.query_starts, batch.seq_lens_S, *(self.shared or (unused, unused))),
            *(partials.num_partials, self.tickets, batch.block_table),
            *(batch.block_table.stride(0), self.scale * LOG2_E),
        )

    @property
    def constants(self) -> dict[str, int | bool]:
        """H, RANK, HAS_SHARED and BLOCK_N."""
        return {
            "H": self.num_heads,
            "RANK": self.plane.rank,
            "HAS_SHARED": self.shared is not None,
            "BLOCK_N": TILE,
        }
