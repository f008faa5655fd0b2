"""When a sequence is over, and how the news of its tokens is worded. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence as PySequence

import numpy as np

from octavo.moments import Moment
from octavo.request import FinishReason, Logprob, PackedLogprobs, PositionLogprobs, TokenDelta
from octavo.scheduler.sequence import Sequence
from octavo.step import TokenLogprobs


def finish_reason(sequence: Sequence) -> FinishReason | None:
    """Returns why `sequence` ends with its newest token, or None if it goes on."""
    token = sequence.token_ids[-1]
    if sequence.guide is not None:
        if sequence.guide.is_over:
            return FinishReason.STOP
    elif token in sequence.stop_ids and sequence.num_outputs > sequence.request.params.min_tokens:
        return FinishReason.STOP
    if len(sequence.token_ids) >= sequence.max_len:
        return FinishReason.LENGTH
    return None


def stop_reason(sequence: Sequence, reason: FinishReason | None) -> int | None:
    """Returns the stop id that ended it; None for EOS, as in vLLM, and for a grammar's end."""
    token = sequence.token_ids[-1]
    is_stop_id = token in sequence.stop_ids and token not in sequence.eos_token_ids
    return token if is_stop_id and reason is FinishReason.STOP else None


def token_delta(
    sequence: Sequence,
    token_ids: tuple[int, ...],
    reason: FinishReason | None,
    *,
    logprobs: PySequence[TokenLogprobs] = (),
    stop: int | str | None = None,
    vector: bytes | None = None,
) -> TokenDelta:
    """Returns what the front end is told of `sequence` after a step."""
    prompt_logprobs, is_first = None, sequence.num_outputs == len(token_ids) > 0
    if sequence.prompt_logprobs is not None and is_first:
        prompt_logprobs = packed_logprobs(sequence.prompt_logprobs)
    return TokenDelta(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=token_ids,
        logprobs=tuple(map(position_logprobs, logprobs)),
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_reason=stop,
        num_cached_tokens=sequence.num_cached_tokens,
        scheduled_time=sequence.scheduled_time,
        vector=vector,
        moments=_told(sequence) if sequence.moments else (),
    )


def _told(sequence: Sequence) -> tuple[Moment, ...]:
    """Returns what has happened to a traced sequence since the last call; of prefills those that
    are computed: others never will be, or are told later."""
    assert sequence.moments is not None
    moments, sequence.moments = sequence.moments, []
    return tuple(one for one in moments if one.end)


def packed_logprobs(positions: PySequence[TokenLogprobs]) -> PackedLogprobs:
    """Returns the message form of a prompt's positions, which all report as many tokens."""
    if not positions:
        return PackedLogprobs(b"", b"", b"")
    return PackedLogprobs(
        np.stack([one.token_ids for one in positions]).astype(np.int32, copy=False).tobytes(),
        np.stack([one.logprobs for one in positions]).astype(np.float32, copy=False).tobytes(),
        np.array([one.rank for one in positions], np.int32).tobytes(),
    )


def position_logprobs(logprobs: TokenLogprobs) -> PositionLogprobs:
    """Returns the message form: the token itself with its rank, then the most likely ones."""
    ids, values = logprobs.token_ids.tolist(), logprobs.logprobs.tolist()
    own = Logprob(token_id=ids[0], logprob=values[0], rank=logprobs.rank)
    best = (
        Logprob(token_id=token, logprob=value, rank=rank)
        for rank, (token, value) in enumerate(zip(ids[1:], values[1:], strict=True), start=1)
    )
    return (own, *best)
