"""AsyncLLM: the engine as async programs use it, and as vLLM's users know it.

Owns the ids that its users choose. The server needs none of this: it asks the engine below.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.engine.client import Client
from octavo.engine.link import LinkOwner
from octavo.engine.mailbox import Inbox, Mailbox
from octavo.engine.pooled_texts import Wanted, checked_params, pooled_output
from octavo.engine.prompts import Prompt, read_prompt
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import (
    RequestError,
)
from octavo.outputs import OutputDelta, RequestOutput, with_texts
from octavo.pooling import (
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from octavo.request import Request, SamplingParams, checked_copy
from octavo.request_fields import refuse_arguments


class AsyncLLM(AsyncEngine):
    """An engine that generates. Use it from one event loop: start, generate, close;
    `async with AsyncLLM(...)` starts and closes it."""

    def __init__(
        self,
        model: str | EngineConfig,
        *,
        log_format: str = "text",
        log_level: str = "info",
        connect: Callable[[LinkOwner], Client] | None = None,
        **options: Any,
    ) -> None:
        """As AsyncEngine's."""
        super().__init__(
            model, log_format=log_format, log_level=log_level, connect=connect, **options
        )
        self._labels: dict[str, str] = {}
        """Ids that users of `generate` chose, to ours, while they are open."""

    def get_tokenizer(self) -> Tokenizer:
        """As LLM's."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """As LLM's."""
        return SamplingParams(**self.default_sampling_params)

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """Yields what the model makes of a prompt, once; closing it aborts the request.

        Raises as `generate` does, and RequestError for a model that only generates.
        """
        refuse_arguments("AsyncLLM.encode", unsupported)
        output = await self._pool(
            "encode", prompt, pooling_params, request_id, priority, cache_salt
        )
        yield output

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> EmbeddingRequestOutput:
        """Returns the embedding of a prompt. Raises as `encode`."""
        return await self._pool("embed", prompt, pooling_params, None, priority, cache_salt)

    async def score(
        self,
        text_1: str,
        text_2: str,
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ScoringRequestOutput:
        """Returns how well two texts belong together, of a model that reads both. Raises as
        `encode`."""
        self._processor.check_pools()
        reader = self.vectors
        assert reader is not None
        reader.require("score", what="scores of pairs")
        ids = await asyncio.to_thread(self.pairs.ids, text_1, text_2, instruction)
        return await self._pool("score", ids, pooling_params, None, priority, cache_salt)

    async def _pool(
        self,
        wanted: Wanted,
        prompt: Prompt,
        given: PoolingParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: str,
    ) -> PoolingRequestOutput[Any]:
        item = read_prompt(prompt)
        salt = cache_salt if item.cache_salt is None else item.cache_salt
        self._processor.check_pools()
        reader = self.vectors
        assert reader is not None
        params = checked_params(given, wanted, reader)
        content = item.content
        if isinstance(content, str):
            content = await asyncio.to_thread(self.tokenizer.encode, content)
        request = self.prepare_vector(content, priority=priority, cache_salt=salt)
        mailbox = Mailbox(max_waiting_tokens=None)
        self.submit(request, Inbox(mailbox))
        try:
            [(_, delta, _)] = await mailbox.take()
        finally:
            self.cancel(request.request_id)
        return pooled_output(request, delta, reader, params, wanted, request_id)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields cumulative outputs, the last one `finished`; closing it aborts the request.

        Without `sampling_params` those of the model apply. `request_id` is open until the
        generator has ended, and free again at once; without one the request gets a new one.
        Of vLLM's other arguments those are taken that ask for nothing.
        Raises RequestError or OverloadedError before the first output, EngineDeadError any time.
        """
        refuse_arguments("AsyncLLM.generate", unsupported)
        given = read_prompt(prompt)
        prompt = given.content
        cache_salt = cache_salt if given.cache_salt is None else given.cache_salt
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = checked_copy(sampling_params)
        if request_id is None:
            request_id = uuid.uuid4().hex
        if request_id in self._labels:
            raise RequestError(f"request_id {request_id!r} is in use already", param="request_id")
        self._labels[request_id] = ""
        request: Request | None = None
        try:
            # Long texts take milliseconds to tokenise: the loop serves others meanwhile.
            if isinstance(prompt, str):
                ids = await asyncio.to_thread(self.tokenizer.encode, prompt)
            else:
                ids = prompt
            wanted = params.structured_outputs
            if wanted is not None and not self.knows_grammar(wanted):
                await asyncio.to_thread(self.constrain, wanted)
            request = self.prepare(ids, params, priority=priority, cache_salt=cache_salt)
            self._labels[request_id] = request.request_id
            mailbox = Mailbox(max_waiting_tokens=None)
            self.submit(request, Inbox(mailbox))
            text = prompt if isinstance(prompt, str) else None
            output = RequestOutput.empty(request, request_id, text)
            while not output.finished:
                news = await mailbox.take()
                deltas = [self._with_texts(delta) for _, delta, _ in news]
                for delta in deltas:
                    output.add(delta)
                # The sequences themselves go on growing: a copy would cost their history.
                yield replace(output, deltas=deltas)
        finally:
            del self._labels[request_id]
            if request is not None:
                self.cancel(request.request_id)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its generator yields what there is with finish reason abort."""
        internal = self._labels.get(request_id)
        if internal:
            self._client.link.abort(internal)

    def _with_texts(self, delta: OutputDelta) -> OutputDelta:
        tokenizer = self.front_end.optional_tokenizer
        return delta if tokenizer is None else with_texts(delta, tokenizer.token_text)
