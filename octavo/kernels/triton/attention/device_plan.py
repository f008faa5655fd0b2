"""What the plan of a step is on the device, for one KV group: beside the lengths and the tables.

Made by plan.py once a step, carried by the group's AttentionBatch, read by the kernels' launches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from octavo.kernels.inputs import AttentionBatch

if TYPE_CHECKING:
    from octavo.kernels.triton.attention.short_chunks import ShortPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrefix:
    """Groups of sequences with equal leading blocks, all int32 tensors on the device."""

    members: Tensor
    """Sequence indices, group after group."""
    group_starts: Tensor
    """[groups + 1]: where each group's members begin."""
    shared_tokens_S: Tensor
    """Tokens of each sequence that its group reads for it; 0 outside groups."""
    shared_partials_S: Tensor
    """Partial results that those leave for each sequence."""
    split_sizes: Tensor
    """[groups] tokens of one partial result."""
    piece_starts: Tensor
    """[groups + 1] prefix sums of their pieces of work: tiles of members times partial results."""
    num_groups: int
    max_members: int
    max_splits: int
    max_tail: int
    """Tokens of the longest private tail, or of the longest sequence outside groups."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrompts:
    """Chunks over latent vectors whose keys and values are all multiplied out, those that groups of
    sequences share once for each group. All int32 tensors on the device."""

    low_S: Tensor
    """Tokens of each sequence that its group attends for it; 0 outside groups."""
    leaders_G: Tensor
    """A sequence of each group."""
    run_starts: Tensor
    """[runs + 1]: the tokens where sequences of one group begin that lie side by side."""
    run_groups_R: Tensor
    """The group of each run; -1: sequences of none."""
    shared_tokens: tuple[int, ...]
    """Of each group, on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRow:
    """A sequence of many queries, as the host knows it."""

    index: int
    """Among the sequences of the step."""
    first_token: int
    end_token: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevicePlan:
    """Bounds that the host knows save launches and memory, and change no bit; None: unknown."""

    max_query_len: int | None = None
    max_seq_len: int | None = None
    num_short_tokens: int | None = None
    """Sequences of few queries, but more than one, lie among the first so many tokens."""
    num_few_tokens: int | None = None
    """Sequences of one query and those of few lie among the first so many tokens."""
    num_long_keys: int | None = None
    """What sequences of more queries see together, but for what groups of `prompts` share."""
    long_rows: tuple[LongRow, ...] | None = None
    """The sequences of more queries, in the order of their tokens."""
    partial_starts_S: Tensor | None = None
    """int32 [S + 1] prefix sums of `partial_counts` (decode.py): where the partial results of each
    single query lie."""
    max_partials: int | None = None
    """Bound of the last of partial_starts_S; goes with it. 0: nobody has a single query."""
    prefix: SharedPrefix | None = None
    """What single-query sequences share, where reading it once pays."""
    prompts: SharedPrompts | None = None
    """How chunks are multiplied out, where it pays to do so with all of them: then none counts as
    one of few queries."""
    short: dict[object, ShortPlan] = field(default_factory=dict)
    """How short chunks are split, made when the first layer of a kind asks: lengths may be known
    on the device alone."""
    long: dict[object, object] = field(default_factory=dict)
    """Where keys of long chunks lie once they are multiplied out or unpacked, made likewise."""


def plan_of(batch: AttentionBatch) -> DevicePlan:
    """Returns the batch's plan, or one that knows nothing."""
    plan = batch.plan
    if plan is None:
        return DevicePlan()
    assert isinstance(plan, DevicePlan), plan
    return plan
