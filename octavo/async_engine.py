"""An engine for an event loop, with the core in a process of its own, and its prepared requests.

Used by the HTTP server, and by AsyncLLM, which is an engine with a face for programs. Text is
handled here, while the core computes.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from octavo.config import EngineConfig
from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.engine.client import Client, EngineClient
from octavo.engine.fleet import Fleet
from octavo.engine.front_end import FrontEnd
from octavo.engine.input_processor import InputProcessor
from octavo.engine.ipc import Deltas
from octavo.engine.link import LinkOwner
from octavo.engine.output_processor import OutputProcessor
from octavo.engine.pairs import PairWriter
from octavo.engine.tokenizer import Tokenizer
from octavo.engine.vectors import VectorReader
from octavo.errors import (
    ConfigError,
    EngineDeadError,
    OctavoError,
    OverloadedError,
    PreemptedError,
)
from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.outputs import Receiver
from octavo.request import NO_SHARE, PrefixCaching, Request, SamplingParams, Share
from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought
from octavo.vllm_options import log_verdicts, read_options


class AsyncEngine:
    """One engine process, or a fleet of them, and its requests. Use it from one event loop: start,
    prepare, submit, close; `async with` starts and closes it."""

    def __init__(
        self,
        model: str | EngineConfig,
        *,
        log_format: str = "text",
        log_level: str = "info",
        connect: Callable[[LinkOwner], Client] | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of LLM, for a model given by its name; `connect` says whose the
        engine processes are: its own if not given. Raises ConfigError."""
        self.config = _config_of(model, options)
        self._log = (log_format, log_level)
        self._client = self._own_client() if connect is None else connect(self)
        self._ids = itertools.count()
        self._explaining = asyncio.Lock()
        self._front_end: FrontEnd | None = None
        self._plan: MemoryPlan | None = None
        self._input: InputProcessor | None = None
        self._output: OutputProcessor | None = None

    def _own_client(self) -> Client:
        if self.config.data_parallel_size == 1:
            return EngineClient(self)
        return Fleet(self, self.config)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Finds and loads the model; returns when requests can be taken.

        Raises ConfigError, ModelError, CapacityError or EngineDeadError.
        """
        if isinstance(self._client, EngineClient):
            self._client.begin()
        try:
            self._front_end = front_end = await asyncio.to_thread(FrontEnd, self.config)
        except BaseException:
            await self._client.close()
            raise
        self._plan, _ = await asyncio.gather(
            self._client.start(self.config, front_end.files, *self._log),
            asyncio.to_thread(front_end.warm_up),
        )
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
    def max_num_seqs(self) -> int:
        return self.config.max_num_seqs * self.config.data_parallel_size

    @property
    def max_num_queued_requests(self) -> int:
        return self.config.max_num_queued_requests * self.config.data_parallel_size

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
    def answer_format(self) -> AnswerFormat | None:
        """How the model writes calls and reasoning; None without a tokenizer."""
        return self.front_end.answer_format

    @property
    def is_ready(self) -> bool:
        return self._input is not None and self._client.link.error is None

    def knows_grammar(self, wanted: StructuredOutputsParams) -> bool:
        """Whether `constrain` takes no time."""
        return self._processor.knows_grammar(wanted)

    def constrain(self, wanted: StructuredOutputsParams) -> Constraint:
        """Returns what an output is held to; may be called from a thread, so that `prepare` need
        not wait for it. Raises RequestError with field and reason."""
        return self._processor.constrain(wanted)

    @property
    def _processor(self) -> InputProcessor:
        if self._input is None:
            raise EngineDeadError("the engine is not started; call start() first")
        return self._input

    # -- requests ----------------------------------------------------------------------------

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        share: Share = NO_SHARE,
        thought: Thought = NO_THOUGHT,
    ) -> Request:
        """Returns the request of a prompt, under an id that no other request ever has.

        Raises RequestError, or EngineDeadError if nothing can be taken.
        """
        self._check_alive()
        return self._processor.process(
            self._client.link.prefix + str(next(self._ids)),
            prompt,
            params,
            priority=priority,
            cache_salt=cache_salt,
            share=share,
            arrival_time=time.monotonic(),
            thought=thought,
        )

    def submit(
        self, request: Request, receiver: Receiver, marks: Mapping[int, str] | None = None
    ) -> None:
        """Hands a request to the engine; `receiver` is told of its progress in the event loop.

        `marks` stand in its text for the tokens of these ids.
        Raises OverloadedError if as many sequences are open as may run and wait, EngineDeadError.
        """
        assert self._output is not None, "a request is prepared by a started engine"
        limit = self.max_num_seqs + self.max_num_queued_requests
        if self._output.num_sequences + request.params.n > limit:
            raise OverloadedError(
                f"{self._output.num_sequences} sequences run and wait already (limit {limit}); "
                "try again later"
            )
        self._client.link.add(request)
        self._output.open(request, receiver, marks)

    def cancel(self, request_id: str) -> None:
        """Ends a submitted request without a word to its receiver; a late call is harmless."""
        if self._output is not None and self._output.close(request_id):
            self._client.link.abort(request_id)

    @property
    def vectors(self) -> VectorReader | None:
        """How vectors are told; None for a model that generates."""
        return self.front_end.vectors

    @property
    def pairs(self) -> PairWriter:
        """How a query and a document become a prompt, of a model that scores them."""
        return self.front_end.pairs

    def check_generates(self) -> None:
        """Raises RequestError for a model that does not, saying what it is."""
        self._processor.check_generates()

    def prepare_vector(
        self,
        prompt: str | Sequence[int],
        *,
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: PrefixCaching | None = None,
        share: Share = NO_SHARE,
    ) -> Request:
        """As `prepare`, for the vector of a prompt."""
        self._check_alive()
        return self._processor.process_vector(
            self._client.link.prefix + str(next(self._ids)),
            prompt,
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=time.monotonic(),
            prefix_caching=prefix_caching,
            share=share,
        )

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; returns False if running requests still hold blocks."""
        return await self._client.link.reset_prefix_cache()

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        """Returns what is cached of the prompt of a prepared request, which does not run. One is
        explained at a time. Raises EngineDeadError."""
        async with self._explaining:
            return await self._client.link.explain_prefix(request)

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine process has ended. Never waits for its answer."""
        self._check_alive()

    def begin_drain(self) -> None:
        """From now on a step without progress is not waited for as long."""
        self._client.begin_drain()

    def hand_back(self) -> int:
        """Fails all requests that have not begun with PreemptedError, for their clients to send
        them elsewhere; returns how many."""
        if self._output is None:
            return 0
        error = PreemptedError(
            "this machine is about to be taken away and has not begun the request; send it again"
        )
        request_ids = self._output.not_begun()
        for request_id in request_ids:
            self._client.link.abort(request_id)
            self._output.fail(request_id, error)
        return len(request_ids)

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        """Returns a snapshot of the engine's counters; `is_detailed`: each expert's and each
        sequence's too. Raises EngineDeadError."""
        return await self._client.link.stats(is_detailed)

    def _check_alive(self) -> None:
        error = self._client.link.error
        if error is not None:
            raise error
        if self._plan is None:
            raise EngineDeadError("the engine is not started; call start() first")

    # -- news from the engine process ----------------------------------------------------------

    def on_deltas(self, message: Deltas) -> None:
        assert self._output is not None
        for request_id, index in self._output.process(message.deltas, time.monotonic()):
            self._client.link.abort(request_id, index)

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        if self._output is not None:
            self._output.fail(request_id, error)

    def on_death(self, error: EngineDeadError) -> None:
        if self._output is not None:
            self._output.fail_all(error)


def _config_of(model: str | EngineConfig, options: Mapping[str, Any]) -> EngineConfig:
    if isinstance(model, EngineConfig):
        if options:
            raise ConfigError(
                f"{', '.join(options)}: give options either in EngineConfig or beside the model's "
                "name",
                field=next(iter(options)),
            )
        return model.resolve()
    config, verdicts = read_options(model, options)
    log_verdicts(verdicts)
    return config
