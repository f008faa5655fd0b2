"""What launches over single queries are given: the rows, and where their partial results go.

Made by decode.py, taken by its kernel and by hopper/lone.py. Launches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.facts import split_partials
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.partials import Partials, make_partials
from octavo.kernels.triton.attention.scores import most_visible


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SingleRows:
    """Arguments that all such launches share: see `decode_attention`."""

    q_THD: Tensor
    op: AttentionOp
    layer: KVLayer
    batch: AttentionBatch
    out: Tensor
    partials: Partials
    most_partials: int
    """That a row may leave."""
    tickets: Tensor
    shared: tuple[Tensor, Tensor] | None = None
    token_sequences: Tensor | None = None

    @property
    def count(self) -> int:
        """Rows of the launch: those without a single query, too."""
        by_token = self.token_sequences is not None
        return len(self.out) if by_token else len(self.batch.seq_lens_S)


def most_partials(op: AttentionOp, max_seq_len: int) -> int:
    """Returns how many partial results a row leaves at most."""
    return split_partials(most_visible(op.visibility, max_seq_len))


def room_for(out: Tensor, batch: AttentionBatch, rows: int, most: int) -> Partials:
    """Returns room for `most` partial results of each of `rows`, or for those that a step's plan
    counts."""
    plan = plan_of(batch)
    is_packed = plan.partial_starts_S is not None
    room = plan.max_partials if is_packed else rows * most
    return make_partials(out, most, plan.partial_starts_S, room)
