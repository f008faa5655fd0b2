"""The contract between scheduler and runner: one plan in, one result out.

The scheduler makes a StepPlan, the runner executes exactly that, in order, and answers with a
StepResult. They share nothing else. Everything of variable length is a NumPy array, since a plan
of 256 decodes must cost microseconds, not milliseconds, and travels to other processes as bytes.

What a runner does with a plan, in this order:
    1. release `freed_rows`, poison `freed_pages` (only in test mode)
    2. start `starts`: forget what the row held, keep the new sequence's sampling state
    3. copy `copies` (copy-on-write), apply `table_deltas` to its mirror of the block tables
    4. forward all `rows`; write their KV; for each row what its purpose says: nothing, a token,
       which is kept by row, or the sequence's vector
    5. copy `saves`
    6. sample the `masked` rows, when their masks are there

A plan may have no rows: then 4 and 6 are nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.request import SamplingParams

Int32 = NDArray[np.int32]
Int8 = NDArray[np.int8]
Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Words = NDArray[np.uint32]
"""Bits of token ids: bit i of word w stands for id 32 w + i."""


MAX_PADDED_TOKENS = 2048
"""A step of at most so many tokens is padded and replayed as a graph on a GPU; one of a few more
takes as long as the host needs to launch it, twice as long and more."""
MAX_PADDED_PROMPT_TOKENS = 4096
"""The same for steps of few rows where several ranks compute, if what is launched for many tokens
is what is launched for few: over grouped queries, numbers as weights and plain keys and values."""
NO_TOKEN = -1
"""Sampled where a row's logits hold a NaN or nothing finite: the sequence ends with an error."""


class Purpose(IntEnum):
    """What a scheduled row is to give."""

    NONE = 0
    """Its KV alone: a part of a prompt."""
    TOKEN = 1
    """What the logits of its last token are sampled to."""
    VECTOR = 2
    """What the model makes of the hidden states of its whole sequence, which ends here."""


_TOKEN = int(Purpose.TOKEN)
"""An enumeration's members are looked up slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """A sequence that takes a row in this step (first time, or again after preemption)."""

    row: int
    params: SamplingParams
    seed: int
    """Of this sequence: equal seeds draw equal tokens at equal output positions."""
    stop_token_ids: tuple[int, ...]
    """Ids that must not be drawn before `params.min_tokens` outputs (EOS included)."""
    prompt_len: int
    token_ids: Int32
    """Prompt, then the outputs known so far: [prompt_len + num_outputs]."""
    wants_vector: bool = False
    """Whether the sequence's vector is wanted, and not tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDelta:
    """What changed in the block table of one KV group: parallel arrays [N], each place once."""

    group: int
    rows: Int32
    columns: Int32
    block_ids: Int32


class Page(NamedTuple):
    """A page of the arena."""

    page_class: int
    block: int


class PageCopy(NamedTuple):
    """One page becomes equal to another of its class."""

    page_class: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One forward pass. S scheduled rows, T tokens in all; arrays are parallel over S."""

    step_id: int
    rows: Int32
    """[S] the persistent row of each scheduled sequence."""
    starts: Int32
    """[S] position of the first token computed in this step."""
    query_lens: Int32
    """[S] tokens computed in this step, at least 1."""
    token_ids: Int32
    """[T] input ids, row after row; 0 where `from_device`."""
    from_device: Bool
    """[S] the row's only token is the one it sampled last, which the host does not know yet."""
    purposes: Int8
    """[S] a `Purpose` each."""
    masked: Bool | None = None
    """[S] of those for a token, which are sampled only by `Runner.sample`: what may come next
    depends on a token that the host does not know at the launch. None: no row."""
    row_starts: tuple[RowStart, ...] = ()
    freed_rows: tuple[int, ...] = ()
    freed_pages: tuple[Page, ...] = ()
    """Pages nobody holds any more; a runner in test mode fills them with NaN."""
    copies: tuple[PageCopy, ...] = ()
    """Copy-on-write, and states to begin with."""
    saves: tuple[PageCopy, ...] = ()
    """States that the step leaves, kept for those that begin there."""
    table_deltas: tuple[TableDelta, ...] = ()

    @property
    def samples(self) -> Bool:
        """[S] whether the last token's logits are sampled."""
        return self.purposes == _TOKEN

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of one position: the token itself first, then the most likely ones."""

    token_ids: Int32
    """[1 + num_logprobs]; the first is the sampled (or prompt) token."""
    logprobs: Float32
    """[1 + num_logprobs] natural log."""
    rank: int
    """Of the first one, 1 = most likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced."""

    step_id: int
    token_ids: Int32
    """A token id each, or NO_TOKEN; row after row."""
    token_starts: Int32
    """[S + 1] where the tokens of each of the plan's rows begin, and the end. A row for a token has
    one or more, others none."""
    logprobs: dict[int, TokenLogprobs]
    """By index into `token_ids`; only rows that asked."""
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]
    """By index into the plan's rows. For a chunk at [start, start + len): entry i speaks of the
    prompt token at start + 1 + i, as far as that is a prompt token."""
    vectors: dict[int, Float32] = field(default_factory=dict)
    """By index into the plan's rows: what each one for a vector has come to, of one dimension."""
    expert_counts: NDArray[np.int64] | None = None
    """[MoE layers, experts] tokens routed in this step; None for dense models."""
    num_splits: int = 0
    """Times that the step, or a part of it, was cut in two because memory was short."""

    @staticmethod
    def single(plan: StepPlan, token_ids: Int32) -> StepResult:
        """Returns a result in which each row for a token has one, and nothing beside it."""
        return StepResult(
            step_id=plan.step_id,
            token_ids=token_ids,
            token_starts=single_starts(plan.purposes),
            logprobs={},
            prompt_logprobs={},
        )


def single_starts(purposes: Int8) -> Int32:
    """Returns `StepResult.token_starts` where each row for a token has one."""
    starts = np.zeros(len(purposes) + 1, np.int32)
    np.cumsum(purposes == Purpose.TOKEN, out=starts[1:])
    return starts


def token_purposes(samples: Bool) -> Int8:
    """Returns the purposes of rows for a token where `samples`, and for nothing elsewhere."""
    return np.where(samples, Purpose.TOKEN, Purpose.NONE).astype(np.int8)


class Runner(Protocol):
    """Executes plans in the order of their launch. One owner calls it; not thread-safe."""

    def launch(self, plan: StepPlan) -> object:
        """Enqueues the step and returns a ticket at once."""
        ...

    def sample(self, ticket: object, masks: Words) -> None:
        """Has the masked rows of a launched step sampled: [rows, ceil(V / 32)], in their order, a
        bit for each id that may come.

        Called once for a step that has such rows, before the next launch; all that fails, `collect`
        raises.
        """
        ...

    def collect(self, ticket: object) -> StepResult:
        """Waits for the step of `ticket`; tickets are collected in launch order.

        Raises OutOfMemoryError if the step can be computed when there is more memory,
        EngineDeadError if the device can be used no more. Whatever a step raises, nothing of its
        plan may be relied on, nor of the plans launched until then: they raise too, or hold
        rubbish. Plans whose sequences all start anew can be computed.
        """
        ...

    def close(self) -> None: ...
