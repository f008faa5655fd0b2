"""POST /v1/completions, whole or streamed, one prompt or several.

Parses, asks the engine through `generation`, formats. Never holds state between requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.outputs import OutputDelta
from octavo.request import PositionLogprobs
from octavo.server.answers import (
    ChunkFrame,
    PlainChunks,
    Usage,
    marked,
)
from octavo.server.body import read_body
from octavo.server.generation import Call, new_call, stream_call, whole_call
from octavo.server.logprobs import CompletionLogprobs, TokenSpelling, prompt_logprobs
from octavo.server.openapi import described
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import Events, json_response, run_attached, stream_response

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", **described("Completion", CompletionRequest, streams=True))
async def create_completion(request: Request) -> Response:
    """Continues text or token ids. Streams server-sent events if `stream` is true."""
    body = await read_body(request, CompletionRequest)
    state = server_state(request)
    state.check_model(body.model)
    params = body.to_params(state.engine.default_sampling_params)
    given = body.prompts()
    texts = [one for one in given if isinstance(one, str)]
    ids = [one for one in given if not isinstance(one, str)]
    # All are of one kind: texts, or ids already.
    prompts = await state.tokenising.encode(texts, body.add_special_tokens) if texts else ids
    call = await new_call(request, body, "cmpl", params, prompts)
    if body.stream:
        return await stream_response(_events(state, body, call), request.receive, state.drain)
    work = whole_call(state, call)
    sequences = await run_attached(work, request.receive, state.drain)
    return json_response(_answer(state, body, call, sequences))


def _answer(
    state: ServerState, body: CompletionRequest, call: Call, prompts: list[list[OutputDelta]]
) -> dict[str, Any]:
    usage, writer = Usage.of(call, body.is_prompt_only), _ChoiceWriter(state, body, call)
    choices = []
    for place, sequences in enumerate(prompts):
        for sequence in sequences:
            usage.add(sequence, is_first=sequence.index == 0)
            choices.append(writer.choice(place, sequence))
    return {
        "id": call.id,
        "object": "text_completion",
        "created": call.created,
        "model": state.model_name,
        "choices": choices,
        "usage": usage.body(),
    }


async def _events(state: ServerState, body: CompletionRequest, call: Call) -> Events:
    usage, writer = Usage.of(call, body.is_prompt_only), _ChoiceWriter(state, body, call)
    frame = ChunkFrame(call, body, usage, kind="text_completion", model=state.model_name)
    n = call.params.n
    plain = None
    if body.logprobs is None and not (body.return_token_ids or frame.has_continuous_usage):
        indices = range(n * len(call.requests))
        plain = PlainChunks(frame, (_stream_choice(index, marked()) for index in indices))
    has_begun = [False] * (n * len(call.requests))
    async with aclosing(stream_call(state, call)) as rounds:
        async for news in rounds:
            events: list[bytes] = []
            for place, delta, _ in news:
                index = place * n + delta.index
                is_first, has_begun[index] = not has_begun[index], True
                usage.add(delta, is_first and delta.index == 0)
                if plain is not None and not is_first and delta.finish_reason is None:
                    if delta.text:
                        events.append(plain.event(index, delta.text))
                elif writer.has_news(place, delta):
                    events.append(frame.event(writer.choice(place, delta)))
            if events:
                yield b"".join(events)
    if body.includes_usage:
        yield frame.usage_event()


def _stream_choice(index: int, text: str) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


class _ChoiceWriter:
    """Makes the choices of one call's sequences, each with what is new since the one before."""

    def __init__(self, state: ServerState, body: CompletionRequest, call: Call) -> None:
        self._engine = state.engine
        self._body = body
        self._requests = call.requests
        self._n = call.params.n
        # What is echoed is what was sent, where all of it was used.
        self._given = body.prompts() if body.truncate_prompt_tokens is None else None
        self._begun: set[int] = set()
        self._logprobs_of: dict[int, CompletionLogprobs] = {}
        self._skips_special_tokens = call.params.skip_special_tokens
        self._prompt_logprobs: dict[int, Sequence[PositionLogprobs | None]] = {}

    def has_news(self, place: int, new: OutputDelta) -> bool:
        """Whether a choice would say anything."""
        asked = self._body.return_token_ids or self._body.logprobs is not None
        begins = bool(self._body.echo) and place * self._n + new.index not in self._begun
        has_tokens = bool(new.token_ids and asked)
        return bool(new.text) or begins or has_tokens or new.finish_reason is not None

    def choice(self, place: int, new: OutputDelta) -> dict[str, Any]:
        """Returns what is new, after the prompt if that is echoed and this is the first choice."""
        body, index = self._body, place * self._n + new.index
        is_first = index not in self._begun
        self._begun.add(index)
        if new.prompt_logprobs is not None:
            self._prompt_logprobs[place] = new.prompt_logprobs
        text, token_ids, positions = new.text, new.token_ids, new.logprobs
        if body.is_prompt_only:
            text, token_ids, positions = "", (), ()
        if is_first and body.echo:
            prompt = self._prompt_text(place)
            text = prompt + text
            if body.logprobs is not None:
                ids, echoed = self._requests[place].prompt_token_ids, self._prompt_logprobs[place]
                self._logprobs(index).echo(prompt, ids, echoed)
        choice = _stream_choice(index, text)
        choice["finish_reason"], choice["stop_reason"] = new.finish_reason, new.stop_reason
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(index).write(positions)
        if body.return_token_ids:
            choice["token_ids"] = token_ids
            if is_first:
                choice["prompt_token_ids"] = self._requests[place].prompt_token_ids
        if is_first and body.prompt_logprobs is not None:
            found = self._prompt_logprobs.get(place)
            choice["prompt_logprobs"] = prompt_logprobs(
                found, body.prompt_logprobs, self._engine.tokenizer
            )
        return choice

    def _prompt_text(self, place: int) -> str:
        prompt = None if self._given is None else self._given[place]
        if isinstance(prompt, str):
            return prompt
        return self._engine.tokenizer.decode(self._requests[place].prompt_token_ids)

    def _logprobs(self, index: int) -> CompletionLogprobs:
        """Returns the writer of one sequence's log-probabilities, the same for all its choices."""
        found = self._logprobs_of.get(index)
        if found is None:
            num_top, skips = self._body.logprobs or 0, self._skips_special_tokens
            as_ids = self._body.return_tokens_as_token_ids
            spelling = TokenSpelling(self._engine.tokenizer, as_ids)
            found = CompletionLogprobs(spelling, num_top, skips)
            self._logprobs_of[index] = found
        return found
