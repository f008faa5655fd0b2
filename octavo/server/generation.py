"""From a parsed body to the engine's outputs: ids, salts, prompts to tokens, several prompts.

Called by the routes of chat and completions. Never formats an answer.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request

from octavo.request import FinishReason, RequestOutput, SamplingParams
from octavo.server.auth import check_priority, tenant_salt
from octavo.server.errors import ApiError
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.state import ServerState, server_state

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the API; every prompt in it becomes one request of the engine."""

    id: str
    """What the client sees."""
    engine_id: str
    """Unique, even if two clients choose the same id."""
    created: int
    params: SamplingParams
    priority: int
    cache_salt: str
    prompts: tuple[Sequence[int], ...]


def new_call(
    request: Request,
    body: SamplingFields,
    kind: str,
    params: SamplingParams,
    prompts: Sequence[Sequence[int]],
) -> Call:
    """Returns the call that `body` asks for; `kind` is the prefix of its id."""
    check_priority(request, body.priority, server_state(request).config.priority_range)
    call_id = f"{kind}-{body.request_id or request.state.request_id}"
    limit = body.truncate_prompt_tokens
    if limit == -1:
        limit = max(1, server_state(request).engine.max_model_len - (params.max_tokens or 1))
    return Call(
        id=call_id,
        engine_id=f"{call_id}-{uuid.uuid4().hex[:12]}",
        created=int(time.time()),
        params=params,
        priority=body.priority,
        cache_salt=tenant_salt(request.state.api_key, body.cache_salt),
        prompts=tuple(prompts if limit is None else (ids[-limit:] for ids in prompts)),
    )


async def run_call(state: ServerState, call: Call) -> Outputs:
    """Yields (prompt index, cumulative output) until all prompts are finished.

    Closing it aborts what still runs. Raises what the engine raises, and ApiError for a sequence
    that ended by an error or was aborted from elsewhere.
    """
    if len(call.prompts) == 1:
        async with aclosing(_run_prompt(state, call, 0)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    newest: dict[int, RequestOutput] = {}
    wake = asyncio.Event()

    async def pump(index: int) -> None:
        async with aclosing(_run_prompt(state, call, index)) as outputs:
            async for output in outputs:
                # Outputs are cumulative: a slow client gets fewer and larger ones.
                newest[index] = output
                wake.set()

    tasks = [asyncio.ensure_future(pump(index)) for index in range(len(call.prompts))]
    for task in tasks:
        task.add_done_callback(lambda _: wake.set())
    try:
        is_done = False
        while not is_done:
            await wake.wait()
            wake.clear()
            # Read before `newest`: what a task left there before it ended is still yielded.
            is_done = all(task.done() for task in tasks)
            for task in tasks:
                if task.done():
                    task.result()
            ready = list(newest.items())
            newest.clear()
            for index, output in ready:
                yield index, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def final_outputs(state: ServerState, call: Call) -> list[RequestOutput]:
    """Returns the finished output of each prompt. Raises as `run_call` does."""
    async with aclosing(run_call(state, call)) as outputs:
        newest = {index: output async for index, output in outputs}
    return [newest[index] for index in range(len(call.prompts))]


async def _run_prompt(
    state: ServerState, call: Call, index: int
) -> AsyncGenerator[RequestOutput, None]:
    engine_id = call.engine_id if len(call.prompts) == 1 else f"{call.engine_id}-{index}"
    outputs = state.engine.generate(
        call.prompts[index],
        call.params,
        request_id=engine_id,
        priority=call.priority,
        cache_salt=call.cache_salt,
    )
    with state.metrics.track(call.params, len(call.prompts[index])) as track:
        async with aclosing(outputs):
            async for output in outputs:
                track.observe(output)
                _check_sequences(output)
                yield output


def _check_sequences(output: RequestOutput) -> None:
    for sequence in output.outputs:
        if sequence.finish_reason == FinishReason.ERROR:
            message = f"the engine could not finish this request: {sequence.stop_reason}"
            raise ApiError(500, message, code="engine_error")
        if sequence.finish_reason == FinishReason.ABORT:
            raise ApiError(503, "the request was aborted", code="aborted")
