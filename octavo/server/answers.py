"""Pieces that the answers of chat and completions share: what is new, usage, log-probabilities.

Called by the routes. Plain dicts, since every streamed token passes here; never waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.request import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from octavo.server.engine_client import ServerTokenizer
from octavo.server.generation import Call
from octavo.server.protocol.sampling import SamplingFields

LEAST_LOGPROB = -9999.0
"""OpenAI's number for a token that is all but impossible; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a sequence has gained since the client was last told."""

    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]


@dataclass(slots=True)
class Cursor:
    """How much of one sequence the client has been told."""

    num_chars: int = 0
    num_tokens: int = 0
    num_logprobs: int = 0
    is_finished: bool = False

    def advance(self, sequence: CompletionOutput) -> Delta:
        """Returns what is new in `sequence` and counts it as told."""
        logprobs = sequence.logprobs or []
        delta = Delta(
            sequence.text[self.num_chars :],
            sequence.token_ids[self.num_tokens :],
            logprobs[self.num_logprobs :],
        )
        self.num_chars = max(self.num_chars, len(sequence.text))
        self.num_tokens = len(sequence.token_ids)
        self.num_logprobs = len(logprobs)
        return delta


class ChunkFrame:
    """What all chunks of one stream have in common."""

    def __init__(
        self,
        call: Call,
        body: SamplingFields,
        *,
        kind: str,
        model: str,
        is_prompt_only: bool = False,
    ) -> None:
        self._common = {"id": call.id, "object": kind, "created": call.created, "model": model}
        self._is_prompt_only = is_prompt_only
        self._includes_usage = body.includes_usage
        self._has_continuous_usage = body.has_continuous_usage

    def chunk(self, choice: dict[str, Any], outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        """Returns a chunk with one choice, and the usage so far if the client wants it."""
        chunk = {**self._common, "choices": [choice]}
        if self._has_continuous_usage:
            chunk["usage"] = usage_of(outputs, self._is_prompt_only)
        elif self._includes_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        """Returns the last chunk: no choice, but the usage."""
        usage = usage_of(outputs, self._is_prompt_only)
        return {**self._common, "choices": [], "usage": usage}


def usage_of(outputs: Iterable[RequestOutput], is_prompt_only: bool = False) -> dict[str, Any]:
    """Returns OpenAI's usage of one call: all its prompts and all their sequences."""
    num_prompt = num_cached = num_generated = 0
    for output in outputs:
        num_prompt += output.prompt_len
        num_cached += output.num_cached_tokens
        if not is_prompt_only:
            num_generated += sum(len(sequence.token_ids) for sequence in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def chat_logprobs(
    positions: Sequence[PositionLogprobs], num_top: int, tokenizer: ServerTokenizer
) -> dict[str, Any]:
    """Returns the `logprobs` of a chat choice."""

    def entry(one: Logprob) -> dict[str, Any]:
        token = _token_text(one, tokenizer)
        return {"token": token, "logprob": _finite(one.logprob), "bytes": list(token.encode())}

    return {
        "content": [
            {**entry(drawn), "top_logprobs": [entry(one) for one in top[:num_top]]}
            for drawn, *top in positions
        ]
    }


def completion_logprobs(
    positions: Sequence[PositionLogprobs | None],
    unknown_ids: Sequence[int],
    offset: int,
    tokenizer: ServerTokenizer,
) -> dict[str, Any]:
    """Returns the `logprobs` of a completion choice, whose text begins at `offset`.

    A position of None (the first prompt token has no probability) takes its token from
    `unknown_ids`, in order.
    """
    tokens: list[str] = []
    chances: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    unknown = iter(unknown_ids)
    for position in positions:
        offsets.append(offset)
        if position is None:
            tokens.append(tokenizer.decode([next(unknown)], skip_special_tokens=False))
            chances.append(None)
            tops.append(None)
        else:
            tokens.append(_token_text(position[0], tokenizer))
            chances.append(_finite(position[0].logprob))
            tops.append({_token_text(o, tokenizer): _finite(o.logprob) for o in position})
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": chances,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs_of(output: RequestOutput, tokenizer: ServerTokenizer) -> list[Any] | None:
    """Returns vLLM's `prompt_logprobs`: per prompt token a map from token id, or None."""
    if output.prompt_logprobs is None:
        return None
    return [
        position
        and {
            str(one.token_id): {
                "logprob": _finite(one.logprob),
                "rank": one.rank,
                "decoded_token": _token_text(one, tokenizer),
            }
            for one in position
        }
        for position in output.prompt_logprobs
    ]


def _token_text(one: Logprob, tokenizer: ServerTokenizer) -> str:
    if one.decoded_token is not None:
        return one.decoded_token
    return tokenizer.decode([one.token_id], skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
