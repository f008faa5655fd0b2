"""POST /v1/completions, whole or streamed, one prompt or several.

Parses, asks the engine through `generation`, formats. Never holds state between requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.request import PositionLogprobs
from octavo.server.answer_wire import wire_of
from octavo.server.answers import (
    ChunkFrame,
    PlainChunks,
    Usage,
)
from octavo.server.asked_params import asked_params
from octavo.server.body import read_body
from octavo.server.call import Call
from octavo.server.generation import StreamedCall, new_call, whole_call
from octavo.server.logprobs import CompletionLogprobs, TokenSpelling, prompt_logprobs
from octavo.server.openapi import described
from octavo.server.pieces import Later, Lazy
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import failure_event, long_response, run_attached, stream_response
from octavo.server.tokenising import completion_ids

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", **described("Completion", CompletionRequest, streams=True))
async def create_completion(request: Request) -> Response:
    """Continues text or token ids. Streams server-sent events if `stream` is true."""
    return await answer_completion(request, await read_body(request, CompletionRequest))


async def answer_completion(request: Request, body: CompletionRequest) -> Response:
    """Returns the answer to a completion's body, whole or streamed."""
    state = server_state(request)
    state.check_model(body.model)
    state.engine.check_generates()
    params = await asked_params(body, state.engine.default_sampling_params)
    began = time.monotonic()
    prompts = await completion_ids(state.tokenising, body)
    request.scope["state"]["exchange"].tokenising = (began, time.monotonic())
    call = await new_call(request, body, "cmpl-", params, prompts)
    echoed = await _echoed_texts(state, body, call)
    wire = wire_of(request.scope)
    if body.stream:
        rounds, writer = StreamedCall(state, call), _Events(state, body, call, echoed)
        return await stream_response(rounds, writer, request.receive, state.drain, wire)
    work = whole_call(state, call)
    sequences = await run_attached(work, request.receive, state.drain, wire)
    return await long_response(_answer(state, body, call, sequences, echoed), state.drain)


async def _echoed_texts(state: ServerState, body: CompletionRequest, call: Call) -> list[str]:
    """Returns the text of each prompt if they are echoed: as it was sent, where all was used."""
    if not body.echo:
        return []
    if body.truncate_prompt_tokens is None and isinstance(body.prompts()[0], str):
        return [text for text in body.prompts() if isinstance(text, str)]
    return [await state.tokenising.decode(one.prompt_token_ids) for one in call.requests]


def _answer(
    state: ServerState,
    body: CompletionRequest,
    call: Call,
    prompts: list[list[OutputDelta]],
    echoed: list[str],
) -> dict[str, Any]:
    usage, writer = Usage.of(call, body.is_prompt_only), _ChoiceWriter(state, body, call, echoed)

    def choices() -> Iterator[dict[str, Any]]:
        for place, sequences in enumerate(prompts):
            for sequence in sequences:
                usage.add(sequence, is_first=sequence.index == 0)
                yield writer.choice(place, sequence)

    return {
        "id": call.id,
        "object": "text_completion",
        "created": call.created,
        "model": state.model_name,
        "choices": Lazy(choices()),
        "usage": Later(usage.body),
    }


class _Events:
    """Writes the events of one streamed call."""

    def __init__(
        self, state: ServerState, body: CompletionRequest, call: Call, echoed: list[str]
    ) -> None:
        self._usage = usage = Usage.of(call, body.is_prompt_only)
        self._frame = frame = ChunkFrame(
            call, body, usage, kind="text_completion", model=state.model_name
        )
        self._writer = _ChoiceWriter(state, body, call, echoed)
        self._n = n = call.params.n
        num_sequences = n * len(call.requests)
        self._plain = None
        tells_tokens = body.return_token_ids or body.prompt_logprobs is not None
        if body.logprobs is None and not (tells_tokens or frame.has_continuous_usage):
            self._plain = PlainChunks(frame, _stream_choice, num_sequences)
        self.is_brief = self._plain is not None
        self._begins_plainly = not body.echo
        self._has_begun = [False] * num_sequences

    def events(self, news: list[News]) -> bytes | Iterator[bytes]:
        """Returns the events of one round; in pieces if they tell of each token, since a round
        may hold a whole prompt, or all that a slow reader has missed."""
        if self._plain is None:
            return self._pieces(news)
        if len(news) == 1:  # nearly always: one sequence, one token
            place, delta, _ = news[0]
            index = place * self._n + delta.index
            has_begun = self._has_begun[index]
            if delta.finish_reason is None and (has_begun or self._begins_plainly):
                self._usage.add(delta, not has_begun and delta.index == 0)
                self._has_begun[index] = True
                return self._plain.event(index, delta.text) if delta.text else b""
        return b"".join(self._pieces(news))

    def _pieces(self, news: list[News]) -> Iterator[bytes]:
        has_begun, plain = self._has_begun, self._plain
        for place, delta, _ in news:
            index = place * self._n + delta.index
            is_first, has_begun[index] = not has_begun[index], True
            self._usage.add(delta, is_first and delta.index == 0)
            if plain is not None and not is_first and delta.finish_reason is None:
                if delta.text:
                    yield plain.event(index, delta.text)
            elif self._writer.has_news(place, delta):
                choice = self._writer.choice(place, delta)
                if plain is not None:
                    yield self._frame.event(choice)
                else:
                    yield from self._frame.event_pieces(choice)

    async def end(self) -> bytes:
        return self._frame.end()

    def failure(self, error: Exception) -> bytes:
        return failure_event(error)


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

    def __init__(
        self, state: ServerState, body: CompletionRequest, call: Call, echoed: list[str]
    ) -> None:
        self._engine = state.engine
        self._body = body
        self._requests = call.requests
        self._n = call.params.n
        self._echoed = echoed
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
            prompt = self._echoed[place]
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
