"""POST /v1/chat/completions, whole or streamed.

Parses, asks the engine through `generation`, formats. Never holds state between requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.engine.mailbox import News
from octavo.outputs import OutputDelta
from octavo.server.answer_wire import wire_of
from octavo.server.answers import ChunkFrame, PlainChunks, Usage
from octavo.server.body import read_body
from octavo.server.call import Call
from octavo.server.chat_answers import finish_reason, streamed_delta, whole_message
from octavo.server.chat_calls import chat_call
from octavo.server.generation import StreamedCall, whole_call
from octavo.server.logprobs import TokenSpelling, chat_logprobs, prompt_logprobs
from octavo.server.openapi import described
from octavo.server.pieces import Later, Lazy
from octavo.server.protocol.chat import ChatRequest
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import failure_event, long_response, run_attached, stream_response
from octavo.tools.answers import AnswerReader, AnswerReading

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", **described("ChatCompletion", ChatRequest, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answers messages. Streams server-sent events if `stream` is true."""
    return await answer_chat(request, await read_body(request, ChatRequest))


async def answer_chat(request: Request, body: ChatRequest) -> Response:
    """Returns the answer to a chat's body, whole or streamed."""
    state = server_state(request)
    call, reading = await chat_call(request, body, "chatcmpl-")
    wire = wire_of(request.scope)
    if body.stream:
        rounds, writer = StreamedCall(state, call), _Events(state, body, call, reading)
        return await stream_response(rounds, writer, request.receive, state.drain, wire)
    work = whole_call(state, call)
    [sequences] = await run_attached(work, request.receive, state.drain, wire)
    return await long_response(_answer(state, body, call, reading, sequences), state.drain)


def _answer(
    state: ServerState,
    body: ChatRequest,
    call: Call,
    reading: AnswerReading | None,
    sequences: list[OutputDelta],
) -> dict[str, Any]:
    usage = Usage.of(call)
    for sequence in sequences:
        usage.add(sequence, is_first=sequence.index == 0)

    def choices() -> Iterator[dict[str, Any]]:
        for sequence in sequences:
            reader = None if reading is None else reading.begin()
            yield _choice(state, body, sequence, reader)
            if reader is not None:
                usage.add_reasoning(reader.num_reasoning_tokens)

    answer = {
        "id": call.id,
        "object": "chat.completion",
        "created": call.created,
        "model": state.model_name,
        "choices": Lazy(choices()),
        # What is reasoning is known when all choices are read.
        "usage": usage.body() if reading is None else Later(usage.body),
    }
    if body.prompt_logprobs is not None:
        positions = sequences[0].prompt_logprobs
        answer["prompt_logprobs"] = prompt_logprobs(
            positions, body.prompt_logprobs, state.engine.tokenizer
        )
    if body.return_token_ids:
        answer["prompt_token_ids"] = call.requests[0].prompt_token_ids
    return answer


def _choice(
    state: ServerState, body: ChatRequest, sequence: OutputDelta, reader: AnswerReader | None
) -> dict[str, Any]:
    reason = sequence.finish_reason
    if reader is None:
        content = body.echoed_text() + sequence.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    else:
        message = whole_message(reader, sequence, body.echoed_text())
        reason = finish_reason(reader, reason)
    choice = {
        "index": sequence.index,
        "message": message,
        "logprobs": _logprobs(state, body, sequence),
        "finish_reason": reason,
        "stop_reason": sequence.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = sequence.token_ids
    return choice


def _logprobs(
    state: ServerState, body: ChatRequest, sequence: OutputDelta
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    spelling = TokenSpelling(state.engine.tokenizer, body.return_tokens_as_token_ids)
    return chat_logprobs(sequence.logprobs, body.top_logprobs or 0, spelling)


class _Events:
    """Writes the events of one streamed call."""

    def __init__(
        self, state: ServerState, body: ChatRequest, call: Call, reading: AnswerReading | None
    ) -> None:
        self._state, self._body, self._call = state, body, call
        self._usage = usage = Usage.of(call)
        self._frame = frame = ChunkFrame(
            call, body, usage, kind="chat.completion.chunk", model=state.model_name
        )
        n = call.params.n
        self._readers = None if reading is None else [reading.begin() for _ in range(n)]
        self._plain = None
        is_told_by_token = body.logprobs or body.return_token_ids or frame.has_continuous_usage
        if reading is None and not is_told_by_token:
            self._plain = PlainChunks(frame, _text_choice, n)
        self.is_brief = self._plain is not None
        self._has_begun = [False] * n
        self._is_first_round = True

    def events(self, news: list[News]) -> bytes | Iterator[bytes]:
        """Returns the events of one round, before the first those that open the messages; in
        pieces if they tell of each token, since a slow reader may have missed thousands."""
        if self._plain is None:
            return self._pieces(news)
        if len(news) == 1:  # nearly always: one sequence, one token
            _, delta, _ = news[0]
            if self._has_begun[delta.index] and delta.finish_reason is None:
                self._usage.add(delta, False)
                return self._plain.event(delta.index, delta.text) if delta.text else b""
        return b"".join(self._pieces(news))

    def _pieces(self, news: list[News]) -> Iterator[bytes]:
        has_begun, plain = self._has_begun, self._plain
        if self._is_first_round:
            self._is_first_round = False
            yield from _first_events(self._body, self._call, self._frame)
        for _, delta, _ in news:
            is_first, has_begun[delta.index] = not has_begun[delta.index], True
            self._usage.add(delta, is_first and delta.index == 0)
            if plain is not None and delta.finish_reason is None:
                if delta.text:
                    yield plain.event(delta.index, delta.text)
            elif self._readers is None:
                for choice in _new_choices(self._state, self._body, delta):
                    yield from self._frame.event_pieces(choice)
            else:
                yield from self._read(delta, self._readers[delta.index])

    def _read(self, new: OutputDelta, reader: AnswerReader) -> Iterator[bytes]:
        num_before = reader.num_reasoning_tokens
        delta = streamed_delta(reader.push(new.text, new.token_ids, new.finish_reason))
        self._usage.add_reasoning(reader.num_reasoning_tokens - num_before)
        reason = finish_reason(reader, new.finish_reason)
        for choice in _new_choices(self._state, self._body, new, delta, reason):
            yield from self._frame.event_pieces(choice)

    async def end(self) -> bytes:
        return self._frame.end()

    def failure(self, error: Exception) -> bytes:
        return failure_event(error)


def _first_events(body: ChatRequest, call: Call, frame: ChunkFrame) -> Iterator[bytes]:
    """Yields what opens the message of each sequence."""
    more: dict[str, Any] = {}
    if body.return_token_ids:
        more["prompt_token_ids"] = call.requests[0].prompt_token_ids
    for index in range(call.params.n):
        delta = {"role": "assistant", "content": body.echoed_text()}
        yield frame.event(_stream_choice(index, delta), **more)


def _new_choices(
    state: ServerState,
    body: ChatRequest,
    new: OutputDelta,
    delta: dict[str, Any] | None = None,
    reason: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a choice for what is new, and one for the end; `delta` and `reason` where they are
    not the text and the reason of `new` itself."""
    if delta is None:
        delta, reason = {"content": new.text} if new.text else {}, new.finish_reason
    if delta or new.logprobs or (new.token_ids and body.return_token_ids):
        choice = _stream_choice(new.index, delta or {"content": ""})
        choice["logprobs"] = _logprobs(state, body, new)
        if body.return_token_ids:
            choice["token_ids"] = new.token_ids
        yield choice
    if new.finish_reason is not None:
        end = {"finish_reason": reason, "stop_reason": new.stop_reason}
        yield {**_stream_choice(new.index, {}), **end}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return _stream_choice(index, {"content": text})


def _stream_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
