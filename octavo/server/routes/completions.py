"""POST /v1/completions, whole or streamed, one prompt or several.

Parses, asks the engine through `generation`, formats. Never holds state between requests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.request import CompletionOutput, PositionLogprobs, RequestOutput
from octavo.server.answers import (
    ChunkFrame,
    Cursor,
    Delta,
    completion_logprobs,
    prompt_logprobs_of,
    usage_of,
)
from octavo.server.body import read_body
from octavo.server.engine_client import Engine
from octavo.server.errors import ApiError
from octavo.server.generation import Call, final_outputs, new_call, run_call
from octavo.server.openapi import body_of
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.state import ServerState, server_state
from octavo.server.streaming import json_response, run_attached, stream_response

router = APIRouter(tags=["OpenAI"])

MAX_PROMPTS = 1024
"""Prompts in one call."""


@router.post("/v1/completions", response_model=None, openapi_extra=body_of(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continues text or token ids. Streams server-sent events if `stream` is true."""
    body = await read_body(request, CompletionRequest)
    state = server_state(request)
    state.check_model(body.model)
    params = body.to_params(state.engine.default_sampling_params)
    given = body.prompts()
    if len(given) > MAX_PROMPTS:
        message = f"prompt holds {len(given)} prompts; at most {MAX_PROMPTS} fit in one call"
        raise ApiError(400, message, param="prompt")
    texts = [one for one in given if isinstance(one, str)]
    ids = [one for one in given if not isinstance(one, str)]
    # All are of one kind: texts, or ids already.
    prompts = await state.tokenising.encode(texts, body.add_special_tokens) if texts else ids
    call = new_call(request, body, "cmpl", params, prompts)
    if body.stream:
        return await stream_response(_chunks(state, body, call), request.receive, state.drain)
    work = final_outputs(state, call)
    outputs = await run_attached(work, request.receive, state.drain)
    return json_response(_answer(state, body, call, outputs))


def _answer(
    state: ServerState, body: CompletionRequest, call: Call, outputs: list[RequestOutput]
) -> dict[str, Any]:
    writers = _writers(state, body, call)
    choices = [
        writers[i][sequence.index].choice(output, sequence)
        for i, output in enumerate(outputs)
        for sequence in output.outputs
    ]
    return {
        "id": call.id,
        "object": "text_completion",
        "created": call.created,
        "model": state.model_name,
        "choices": choices,
        "usage": usage_of(outputs, body.is_prompt_only),
    }


async def _chunks(
    state: ServerState, body: CompletionRequest, call: Call
) -> AsyncGenerator[dict[str, Any], None]:
    frame = ChunkFrame(
        call,
        body,
        kind="text_completion",
        model=state.model_name,
        is_prompt_only=body.is_prompt_only,
    )
    writers = _writers(state, body, call)
    newest: dict[int, RequestOutput] = {}
    async with aclosing(run_call(state, call)) as outputs:
        async for i, output in outputs:
            newest[i] = output
            for sequence in output.outputs:
                writer = writers[i][sequence.index]
                if writer.has_news(sequence):
                    yield frame.chunk(writer.choice(output, sequence), newest.values())
    if body.includes_usage:
        yield frame.usage_chunk(newest.values())


def _writers(state: ServerState, body: CompletionRequest, call: Call) -> list[list[_ChoiceWriter]]:
    """Returns one writer for each sequence of each prompt."""
    n = call.params.n
    given = body.prompts() if body.truncate_prompt_tokens is None else call.prompts
    return [
        [_ChoiceWriter(body, state.engine, i * n + j, prompt) for j in range(n)]
        for i, prompt in enumerate(given)
    ]


class _ChoiceWriter:
    """Makes the choices of one sequence, each with what is new since the one before."""

    def __init__(
        self,
        body: CompletionRequest,
        engine: Engine,
        index: int,
        prompt: str | Sequence[int],
    ) -> None:
        self._body = body
        self._engine = engine
        self._index = index
        self._prompt = prompt
        self._cursor = Cursor()
        self._has_begun = False
        self._offset = 0

    def has_news(self, sequence: CompletionOutput) -> bool:
        """Whether a choice would say anything."""
        cursor = self._cursor
        if cursor.is_finished:
            return False
        is_longer = len(sequence.text) > cursor.num_chars
        has_tokens = len(sequence.token_ids) > cursor.num_tokens
        asked = self._body.return_token_ids or self._body.logprobs is not None
        begins = bool(self._body.echo) and not self._has_begun
        return is_longer or begins or (has_tokens and asked) or sequence.finish_reason is not None

    def choice(self, output: RequestOutput, sequence: CompletionOutput) -> dict[str, Any]:
        """Returns what is new in `sequence`, after the prompt if that is echoed."""
        body, is_first = self._body, not self._has_begun
        self._has_begun = True
        new = self._cursor.advance(sequence)
        self._cursor.is_finished = sequence.finish_reason is not None
        if body.is_prompt_only:
            new = Delta("", [], [])
        text = new.text
        positions: list[PositionLogprobs | None] = [*new.logprobs]
        if is_first and body.echo:
            text = self._prompt_text() + text
            positions = [*(output.prompt_logprobs or ()), *positions]
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": None,
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(positions, output)
        if body.return_token_ids:
            choice["token_ids"] = new.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if is_first and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_of(output, self._engine.tokenizer)
        return choice

    def _prompt_text(self) -> str:
        prompt = self._prompt
        return prompt if isinstance(prompt, str) else self._engine.tokenizer.decode(prompt)

    def _logprobs(
        self, positions: list[PositionLogprobs | None], output: RequestOutput
    ) -> dict[str, Any]:
        result = completion_logprobs(
            positions, output.prompt_token_ids, self._offset, self._engine.tokenizer
        )
        if positions:
            self._offset = result["text_offset"][-1] + len(result["tokens"][-1])
        return result
