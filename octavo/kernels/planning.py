"""How a back end plans the attention of a step: on the host, once a step, opaque to its caller.

    planner = ops.planner(groups, limits, device)   once, at start
    plan = planner.plan(rows)                       every step, before anything is launched
    plan.arrays                                     go to the device with the step's own arrays
    plan.on_device(batches, tensors)                what the layers hand to the ops

Who replays steps pads them first: `plan.padded`; plans of equal `bounds` launch the same kernels.
A back end that plans nothing has `Unplanned`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.kernels.inputs import AttentionBatch
from octavo.step import Int32
from octavo.visibility import KVVisibility


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """A KV group as far as a plan depends on it. Its layers are alike."""

    num_heads: int
    num_kv_heads: int
    is_latent: bool = False
    """Whether all heads read one latent vector a token."""
    expanding_queries: int = 0
    """So many queries of a latent vector make it worth while to multiply keys and values of the
    heads out of it; 0: never."""
    visibility: KVVisibility
    token_bytes: int
    """What attention reads of one token in all layers of the group."""
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What every step keeps to."""

    max_num_seqs: int
    max_model_len: int
    kv_tokens: int
    """Tokens that the KV cache holds at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The rows of one step, on the host."""

    rows: Int32
    """[S] persistent row of each."""
    query_lens: Int32
    """[S]"""
    query_starts: Int32
    """[S + 1] prefix sums of query_lens."""
    seq_lens: Int32
    """[S] tokens that each row's last query sees, itself among them."""
    tables: Sequence[Int32]
    """Block tables [max rows, columns] of all persistent rows, by KV group."""
    num_started: int
    """Sequences that have been given a persistent row so far: while it stays, rows hold who they
    held."""


class StepAttention(Protocol):
    """The plan of one step."""

    @property
    def arrays(self) -> Sequence[Int32]:
        """What the device needs of it; equal `bounds` give equal lengths once padded."""
        ...

    @property
    def bounds(self) -> Hashable:
        """What launches depend on, beside the numbers of rows and tokens; None: nothing."""
        ...

    def padded(self, num_rows: int, num_tokens: int) -> StepAttention | None:
        """Returns the plan of the same rows, followed by rows of length 0 that own the padding (one
        query each while there are any, the last one the rest); None where that does not fit."""
        ...

    def on_device(
        self, batches: Sequence[AttentionBatch], tensors: Sequence[Tensor]
    ) -> tuple[AttentionBatch, ...]:
        """Returns the batches of all KV groups as the back end's ops want them; `tensors` are what
        `arrays` have become."""
        ...


class AttentionPlanner(Protocol):
    """Plans step after step."""

    def plan(self, rows: StepRows) -> StepAttention: ...


class Unplanned:
    """Planner and plan of a back end whose ops find all they need in the batches."""

    arrays: Sequence[Int32] = ()
    bounds: Hashable = None

    def plan(self, rows: StepRows) -> StepAttention:
        return self

    def padded(self, num_rows: int, num_tokens: int) -> StepAttention | None:
        return self

    def on_device(
        self, batches: Sequence[AttentionBatch], tensors: Sequence[Tensor]
    ) -> tuple[AttentionBatch, ...]:
        return tuple(batches)
