"""AsyncLLM: the engine for an event loop, with the core in a process of its own.

Used by the HTTP server and by async programs. Text is handled here, while the core computes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.client import EngineClient
from octavo.engine.front_end import FrontEnd
from octavo.engine.input_processor import InputProcessor
from octavo.engine.ipc import Deltas, Refused
from octavo.engine.output_processor import OutputProcessor
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import EngineDeadError, OctavoError, OverloadedError, RequestError
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import RequestOutput, SamplingParams

_News = RequestOutput | OctavoError


class AsyncLLM:
    """One engine process and its requests. Use it from one event loop: start, generate, close."""

    def __init__(
        self, config: EngineConfig, *, log_format: str = "text", log_level: str = "info"
    ) -> None:
        self.config = config
        self._log = (log_format, log_level)
        self._client = EngineClient(self._on_deltas, self._on_refused, self._on_death)
        self._queues: dict[str, asyncio.Queue[_News]] = {}
        self._front_end: FrontEnd | None = None
        self._plan: MemoryPlan | None = None
        self._input: InputProcessor | None = None
        self._output: OutputProcessor | None = None

    async def start(self) -> None:
        """Finds and loads the model; returns when requests can be taken.

        Raises ConfigError, ModelError, CapacityError or EngineDeadError.
        """
        self._front_end = front_end = await asyncio.to_thread(FrontEnd, self.config)
        self._plan = await self._client.start(self.config, front_end.files, *self._log)
        self._input, self._output = front_end.processors(self._plan.max_model_len)

    def kill(self) -> None:
        """Ends the engine process at once; `close` is still to be called."""
        self._client.kill()

    async def close(self) -> None:
        """Ends the engine process; open requests get EngineDeadError."""
        self._input = None
        await self._client.close()

    # -- facts -------------------------------------------------------------------------------

    @property
    def front_end(self) -> FrontEnd:
        if self._front_end is None:
            raise EngineDeadError("the engine is not started; call start() first")
        return self._front_end

    @property
    def plan(self) -> MemoryPlan:
        if self._plan is None:
            raise EngineDeadError("the engine is not started; call start() first")
        return self._plan

    @property
    def model_name(self) -> str:
        return self.config.model

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.front_end.spec.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        return self.front_end.tokenizer

    @property
    def default_sampling_params(self) -> Mapping[str, Any]:
        """What the model's generation config says, named as in SamplingParams."""
        return self.front_end.default_sampling_params

    @property
    def is_ready(self) -> bool:
        return self._input is not None and not self._client.is_dead

    # -- requests ----------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields cumulative outputs, the last one `finished`; closing it aborts the request.

        Raises RequestError or OverloadedError before the first output, EngineDeadError any time.
        """
        self._client.check_alive()
        if self._input is None or self._output is None:
            raise EngineDeadError("the engine is not started; call start() first")
        if request_id in self._queues:
            raise RequestError(f"request_id {request_id!r} is in use already", param="request_id")
        queue: asyncio.Queue[_News] = asyncio.Queue()
        self._queues[request_id] = queue
        is_finished = False
        try:
            # Long prompts take milliseconds to tokenise: the loop serves others meanwhile.
            request = await asyncio.to_thread(
                self._input.process,
                request_id,
                prompt,
                params,
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=time.monotonic(),
            )
            self._output.add_request(request, prompt if isinstance(prompt, str) else None)
            self._client.add(request)
            while not is_finished:
                news = await queue.get()
                if isinstance(news, OctavoError):
                    is_finished = True
                    raise news
                is_finished = news.finished
                yield news
        finally:
            del self._queues[request_id]
            self._output.abort(request_id)
            if not is_finished:
                self._client.abort(request_id)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its generator yields what there is with finish reason abort."""
        self._client.abort(request_id)

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; returns False if running requests still hold blocks."""
        return await self._client.reset_prefix_cache()

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine process has ended. Never waits for its answer."""
        self._client.check_alive()

    def begin_drain(self) -> None:
        """From now on a step without progress is not waited for as long."""
        self._client.begin_drain()

    async def stats(self) -> EngineStats:
        """Returns a snapshot of the engine's counters. Raises EngineDeadError."""
        return await self._client.stats()

    # -- news from the engine process ----------------------------------------------------------

    def _on_deltas(self, message: Deltas) -> None:
        assert self._output is not None
        processed = self._output.process(message.deltas, time.monotonic())
        for request_id, index in processed.aborts:
            self._client.abort(request_id, index)
        for output in processed.outputs:
            self._tell(output.request_id, output)

    def _on_refused(self, message: Refused) -> None:
        self._tell(message.request_id, OverloadedError(message.message))

    def _on_death(self, error: EngineDeadError) -> None:
        for request_id in list(self._queues):
            self._tell(request_id, error)

    def _tell(self, request_id: str, news: _News) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(news)
