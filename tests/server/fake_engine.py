"""An engine that yields scripted outputs, one character a step, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.engine.chat_template import ChatRenderer, RenderedChat
from octavo.engine.pairs import PairWriter
from octavo.engine.tokenizer import WholeTexts
from octavo.engine.vectors import VectorReader
from octavo.errors import ContextLengthError, EngineDeadError, PreemptedError, RequestError
from octavo.grammar import Checker
from octavo.kv_cache.explain import PrefixExplanation
from octavo.observe.stats import EngineStats
from octavo.outputs import OutputDelta, Receiver
from octavo.request import (
    NO_SHARE,
    Logprob,
    PositionLogprobs,
    PrefixCaching,
    Request,
    SamplingParams,
    Share,
    pack_ids,
)
from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought

NATURAL_LENGTH = 20
BOS = 1
TEMPLATE = (
    "{% if messages[-1].role == 'system' %}{{ raise_exception('not the system last') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class FakeTokenizer:
    """One id a character, and BOS before texts."""

    is_byte_level = True
    special_ids = frozenset({BOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        text.encode()
        return [BOS] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(
            "<s>" if i == BOS else chr(i) for i in ids if i != BOS or not skip_special_tokens
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id], False).encode("utf-8", "replace")

    @property
    def whole_texts(self) -> Mapping[int, str | None]:
        return WholeTexts(self.token_bytes)

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def is_token(self, token_id: int) -> bool:
        return token_id < FakeEngine.vocab_size

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([i], False) for i in ids]

    longest_spelling = 1
    chat_renderer = ChatRenderer(TEMPLATE, {}, ())

    def encode_rendered(self, rendered: RenderedChat) -> list[int]:
        return self.encode(rendered.shown)


class FakeEngine:
    """Yields scripted outputs, one character a step; remembers what it was asked."""

    model_name = "fake"
    max_model_len = 512
    max_num_seqs = 256
    plan = None
    max_num_queued_requests = 4096
    vocab_size = 0x110000
    is_ready = True

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.vectors: VectorReader | None = None
        self.answer_format: AnswerFormat | None = None
        self._checker = Checker({})
        self.default_sampling_params: dict[str, Any] = {}
        self.requests: list[tuple[str, SamplingParams, int, str]] = []
        self.error: Exception | None = None
        """Raised before the first output."""
        self.error_after: tuple[int, Exception] | None = None
        """Raised after so many outputs."""
        self.finish_reason: str | None = None
        """Instead of the natural one."""
        self.answer: str | None = None
        """Instead of the alphabet: a token a character."""
        self.is_endless = False
        self.is_silent = False
        """Never yields, as if the request waited."""
        self.begun = threading.Event()
        self.aborted = threading.Event()
        self.num_running = 0
        self.is_dead = False
        self.has_used_blocks = False
        self.is_hung = False
        """Answers nothing, and dies only when it is told of a drain."""
        self._ids = itertools.count()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._not_begun: dict[str, Receiver] = {}

    @property
    def pairs(self) -> PairWriter:
        raise RequestError("the model scores no pairs", param="model")

    def knows_grammar(self, wanted: StructuredOutputsParams) -> bool:
        return self._checker.knows(wanted)

    def constrain(self, wanted: StructuredOutputsParams) -> Constraint:
        return Constraint(grammar=self._checker.grammar(wanted))

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
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check(ids)
        for listed in (params.allowed_token_ids, params.stop_token_ids, params.logit_bias):
            if max(listed or (), default=0) >= self.vocab_size:
                raise RequestError(f"token id {max(listed or ())} is out of range")
        return Request(
            request_id=f"fake-{next(self._ids)}",
            packed_prompt=pack_ids(ids),
            params=params,
            priority=priority,
            cache_salt=cache_salt,
            share=share,
            arrival_time=time.monotonic(),
        )

    def check_generates(self) -> None:
        """It does."""

    def prepare_vector(
        self,
        prompt: str | Sequence[int],
        *,
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: PrefixCaching | None = None,
        share: Share = NO_SHARE,
    ) -> Request:
        raise RequestError("the model is a generation model", param="model")

    def submit(
        self, request: Request, receiver: Receiver, marks: Mapping[int, str] | None = None
    ) -> None:
        self.requests.append(
            (request.request_id, request.params, request.priority, request.cache_salt)
        )
        if self.error is not None:
            raise self.error
        self.num_running += 1
        task = asyncio.get_running_loop().create_task(self._generate(request, receiver))
        self._tasks[request.request_id] = task
        self._not_begun[request.request_id] = receiver
        self.begun.set()

    def cancel(self, request_id: str) -> None:
        self._not_begun.pop(request_id, None)
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()
            self.num_running -= 1
            self.aborted.set()

    async def _generate(self, request: Request, receiver: Receiver) -> None:
        if self.is_silent:
            await asyncio.Event().wait()
        try:
            for step in range(1, 10**9):
                if self.error_after is not None and step > self.error_after[0]:
                    raise self.error_after[1]
                if self._told(request, receiver, step):
                    break
                await asyncio.sleep(0)
        except Exception as error:
            self._end(request)
            receiver.fail(error)  # type: ignore[arg-type]  # what a bug raises, too

    def _end(self, request: Request) -> None:
        del self._tasks[request.request_id]
        self.num_running -= 1

    def _told(self, request: Request, receiver: Receiver, step: int) -> bool:
        """Tells each sequence's token of a step; returns whether it was the last."""
        self._not_begun.pop(request.request_id, None)
        ids, params = request.prompt_token_ids, request.params
        limit = params.max_tokens or self.max_model_len - len(ids)
        length = NATURAL_LENGTH if self.answer is None else len(self.answer)
        end = limit if params.ignore_eos else min(limit, length)
        finished = step >= end and not self.is_endless
        reason = ("length" if end == limit else "stop") if finished else None
        if finished:
            self._end(request)
        for index in range(params.n):
            token = 97 + (sum(ids) + index + step - 1) % 26
            if self.answer is not None:
                token = ord(self.answer[step - 1])
            prompt_logprobs = None
            if params.prompt_logprobs is not None and step == 1 and index == 0:
                prompt_logprobs = [None, *(_position(t, params.prompt_logprobs) for t in ids[1:])]
            delta = OutputDelta(
                index=index,
                text=self.tokenizer.decode([token]),
                token_ids=(token,),
                logprobs=() if params.logprobs is None else [_position(token, params.logprobs)],
                prompt_logprobs=prompt_logprobs,
                finish_reason=self.finish_reason if finished and self.finish_reason else reason,
                num_cached_tokens=min(16, len(ids) - 1),
                time=time.monotonic(),
            )
            receiver.receive(delta, finished and index == params.n - 1)
        return finished

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise RequestError("prompt is empty", param="prompt")
        if len(ids) >= self.max_model_len:
            raise ContextLengthError(f"prompt has {len(ids)} tokens, limit {self.max_model_len}")
        if max(ids) >= self.vocab_size:
            raise RequestError(f"token id {max(ids)} is out of range", param="prompt")

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to end."""

    async def reset_prefix_cache(self) -> bool:
        return not self.has_used_blocks

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        await self.check_health()
        cached = min(16, request.prompt_len - 1)
        return PrefixExplanation(
            num_tokens=request.prompt_len, num_cached=cached, block_size=16, reason="new"
        )

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine process ended with code 9")

    def hand_back(self) -> int:
        found, self._not_begun = self._not_begun, {}
        for request_id, receiver in found.items():
            self.cancel(request_id)
            receiver.fail(PreemptedError("this machine is about to be taken away"))
        return len(found)

    def begin_drain(self) -> None:
        self.is_dead |= self.is_hung

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        await self.check_health()
        if self.is_hung:
            await asyncio.Event().wait()
        return EngineStats(num_running=self.num_running, num_blocks=8, num_used_blocks=2)


def _position(token: int, num_top: int) -> PositionLogprobs:
    drawn = Logprob(token_id=token, logprob=-0.5, rank=1, decoded_token=chr(token))
    # The least likely one is impossible: JSON has no infinity.
    others = [Logprob(token_id=token + i, logprob=-float(i)) for i in range(num_top - 1)]
    last = [Logprob(token_id=65, logprob=-float("inf"))] if num_top else []
    return (drawn, *others, *last)


class LongEngine(FakeEngine):
    """For chats with tools in them, and for several turns."""

    max_model_len = 8192
