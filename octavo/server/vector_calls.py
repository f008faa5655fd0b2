"""From a parsed body to vectors: prompts to requests, requests through the engine, what they used.

Called by the routes of embeddings and scores. The requests are those of any other call: they queue,
run, are cancelled and are counted as chats are. Never formats an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from octavo.engine.vectors import VectorReader
from octavo.errors import RequestError
from octavo.outputs import OutputDelta
from octavo.server.answer_wire import wire_of
from octavo.server.auth import check_priority
from octavo.server.call import Call
from octavo.server.generation import PREPARED_AT_ONCE, whole_call
from octavo.server.guards.inputs import guard_of
from octavo.server.limits import check_prompt
from octavo.server.pieces import SLICE_SECONDS
from octavo.server.protocol.pooling import PoolingFields
from octavo.server.state import server_state
from octavo.server.streaming import run_attached
from octavo.server.tenants.callers import caller_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What the prompts of one call have come to."""

    call: Call
    packed: list[bytes]
    """float32 each, as the engine tells them; a `VectorReader` reads them."""
    num_cached_tokens: int

    def head(self, model: str) -> dict[str, Any]:
        """Returns the fields that answers have in common."""
        return {
            "id": self.call.id,
            "object": "list",
            "created": self.call.created,
            "model": model,
        }

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's usage object: nothing is generated."""
        num_prompt = sum(one.prompt_len for one in self.call.requests)
        return {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def begin(request: Request, body: PoolingFields) -> VectorReader:
    """Returns how the model's vectors are read, once it is clear that it is the right one. Raises
    ApiError, RequestError."""
    state = server_state(request)
    state.check_model(body.model)
    reader = state.engine.vectors
    if reader is None:
        state.engine.prepare_vector([0])  # says what the model is
        raise RequestError("the model makes no vectors of texts", param="model")
    reader.check(body.params())
    return reader


async def compute(
    request: Request, body: PoolingFields, kind: str, prompts: Sequence[Sequence[int]]
) -> Vectors:
    """Returns the vectors of prompts; `kind` is the prefix of the call's id.

    Raises RequestError if one of the prompts cannot be served, before any of them runs, and what
    `generation.whole_call` raises.
    """
    state, known = server_state(request), request.scope["state"]
    guard_of(request)
    check_priority(request, body.priority, state.config)
    tenant, engine = caller_of(request).tenant, state.engine
    salt = tenant.salt(body.cache_salt)
    requests = []
    for place, ids in enumerate(prompts):
        if place % PREPARED_AT_ONCE == PREPARED_AT_ONCE - 1:
            await asyncio.sleep(0)
        check_prompt(len(ids), state.config.max_prompt_tokens)
        requests.append(
            engine.prepare_vector(
                ids,
                priority=state.priority_of(body.priority),
                cache_salt=salt,
                prefix_caching=body.prefix_caching,
                share=tenant.share,
            )
        )
    exchange = known["exchange"]
    exchange.num_prompt_tokens = sum(one.prompt_len for one in requests)
    call = Call(
        id=f"{kind}-{body.request_id or known['request_id']}",
        created=int(time.time()),
        params=requests[0].params,
        requests=tuple(requests),
        exchange=exchange,
        tenant=tenant,
    )
    work, wire = whole_call(state, call), wire_of(request.scope)
    found = await run_attached(work, request.receive, state.drain, wire)
    deltas = [one for sequences in found for one in sequences]
    num_cached = sum(one.num_cached_tokens for one in deltas)
    return Vectors(call=call, packed=list(map(_vector, deltas)), num_cached_tokens=num_cached)


async def in_turns(values: Iterable[T]) -> list[T]:
    """Returns the values as a list; others have their turn while they are made."""
    found, begun = [], time.thread_time()
    for value in values:
        found.append(value)
        if time.thread_time() - begun > SLICE_SECONDS:
            await asyncio.sleep(0)
            begun = time.thread_time()
    return found


def _vector(delta: OutputDelta) -> bytes:
    assert delta.vector is not None, "a request for a vector ends with it, or raises"
    return delta.vector
