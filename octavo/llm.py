"""LLM: the offline Python face, with the engine's core in this process.

Names and arguments follow vLLM's, so that `from octavo import LLM, SamplingParams` replaces an
import.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from octavo.engine.chat_template import ChatOptions, Message
from octavo.engine.collectors import ChatCollector, Collector, VectorCollector
from octavo.engine.core import EngineCore
from octavo.engine.fleet_core import Core, FleetCore
from octavo.engine.front_end import FrontEnd, format_of
from octavo.engine.held_answers import held_params
from octavo.engine.load import load_core
from octavo.engine.messages import conversations, read_messages
from octavo.engine.pooled_texts import (
    Wanted,
    checked_params,
    cosine_output,
    pooled_output,
    text_pairs,
)
from octavo.engine.prompts import GivenPrompt, Prompt, params_for, read_prompts
from octavo.engine.tokenizer import Tokenizer
from octavo.engine.vectors import VectorReader
from octavo.errors import ConfigError, OverloadedError, RequestError
from octavo.kv_cache.planner import MemoryPlan
from octavo.models.spec import ModelSpec
from octavo.observe.progress_bar import progress_bar
from octavo.observe.stats import EngineStats
from octavo.outputs import OutputDelta, RequestOutput
from octavo.pooling import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from octavo.request import Request, SamplingParams
from octavo.request_fields import refuse_arguments
from octavo.tools.answers import AnswerReading, reading_of, within_budget
from octavo.tools.definitions import NO_TOOLS, Tools, read_tools, with_choice
from octavo.tools.reasoning_tokens import NO_THOUGHT
from octavo.vllm_options import log_verdicts, read_options


class LLM:
    """A model in this process, or several engines of it in others, for batches of prompts. Not
    thread-safe."""

    def __init__(self, model: str, **options: Any) -> None:
        """`options` are the fields of EngineConfig, and those of vLLM's that ask for what is so
        anyway. Raises ConfigError, ModelError."""
        config, verdicts = read_options(model, options)
        log_verdicts(verdicts)
        # Nobody watches single tokens come.
        self.config = replace(config, step_stretch=config.step_stretch or 0.0)
        self._front_end = FrontEnd(self.config)
        self._core: Core
        files, tokenizer = self._front_end.files, self._front_end.optional_tokenizer
        if self.config.data_parallel_size == 1:
            self._core = load_core(self.config, files, tokenizer=tokenizer)
        else:
            self._core = FleetCore(self.config, files)
        self._input, self._output = self._front_end.processors(self._core.plan.max_model_len)
        self._num_requests = 0

    @property
    def plan(self) -> MemoryPlan:
        return self._core.plan

    @property
    def core(self) -> EngineCore:
        """The engine's loop, for tools that step it themselves; never beside `generate`. Raises
        ConfigError for several engines, which have processes of their own."""
        if not isinstance(self._core, EngineCore):
            raise ConfigError(
                "data_parallel_size is above 1: the engines run in processes of their own, and "
                "only generate and chat reach them",
                field="data_parallel_size",
            )
        return self._core

    @property
    def spec(self) -> ModelSpec:
        return self._front_end.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the engine runs on token ids alone."""
        return self._front_end.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    @property
    def vocab_size(self) -> int:
        return self._front_end.spec.vocab_size

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what the model's generation config says; the rest as SamplingParams has it."""
        return SamplingParams(**self._front_end.default_sampling_params)

    def stats(self) -> EngineStats:
        return self._core.stats(is_detailed=True)

    def reset_prefix_cache(self) -> bool:
        return self._core.reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Returns one output per prompt, in order; all run together, those that may take longest
        first.

        `use_tqdm` shows progress on a terminal; of vLLM's other arguments those are taken that ask
        for nothing. Raises RequestError naming what is wrong, before anything runs.
        """
        refuse_arguments("LLM.generate", unsupported)
        items = read_prompts(prompts)
        return self._generate(items, sampling_params, use_tqdm, priority, cache_salt)

    def _generate(
        self,
        items: Sequence[GivenPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None,
        cache_salt: str,
        chats: Sequence[AnswerReading | None] = (),
        tools: Tools = NO_TOOLS,
    ) -> list[RequestOutput]:
        """`chats`: where the prompts are chats, how the answer to each is read."""
        default = self.get_default_sampling_params()
        params = params_for(items, default if sampling_params is None else sampling_params)
        priorities = [0] * len(items) if priority is None else list(priority)
        if len(priorities) != len(items):
            raise RequestError(
                f"{len(items)} prompts and {len(priorities)} priorities; give one each",
                param="priority",
            )
        readings = list(chats) or [None] * len(items)
        requests = []
        for place, (item, param, order) in enumerate(zip(items, params, priorities, strict=True)):
            prompt, reading = item.content, readings[place]
            param = held_params(param, tools, reading)
            request = self._input.process(
                f"llm-{self._num_requests}",
                prompt,
                param,
                priority=order,
                cache_salt=cache_salt if item.cache_salt is None else item.cache_salt,
                arrival_time=time.monotonic(),
                thought=NO_THOUGHT if reading is None else reading.thought,
            )
            self._num_requests += 1
            requests.append((request, prompt if isinstance(prompt, str) else None))
        collectors: list[Collector] = [
            ChatCollector(request, self._token_text, readings[place])
            if chats
            else Collector(request, text, self._token_text)
            for place, (request, text) in enumerate(requests)
        ]
        for (request, _), collector in zip(requests, collectors, strict=True):
            self._output.open(request, collector, collector.marks)
        self._run([request for request, _ in requests], use_tqdm)
        return [collector.output for collector in collectors]

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        thinking_token_budget: int | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or several, through the model's chat template.

        Messages and tools are those that the server takes. `chat_template` is the text of another
        template, `chat_template_kwargs` are its variables; `thinking_token_budget` bounds the
        reasoning. The outputs have the `message` with which the conversation goes on. Raises
        RequestError.
        """
        refuse_arguments("LLM.chat", unsupported)
        tool_set = with_choice(read_tools(tools), tool_choice, parallel_tool_calls)
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            documents=documents,
            tools=tool_set.for_template(),
            template_kwargs=chat_template_kwargs or {},
        )
        tokenizer, found = self.tokenizer, self._front_end.answer_format
        if chat_template is not None:
            tokenizer = tokenizer.with_chat_template(chat_template)
            found = format_of(self.config, tokenizer)
        read = [read_messages(chat, place) for place, chat in conversations(messages)]
        prompts = [tokenizer.encode_chat(chat, options) for chat in read]
        items = [GivenPrompt(content=prompt.token_ids) for prompt in prompts]
        chats = [
            within_budget(reading_of(found, tool_set, prompt.text), thinking_token_budget)
            for prompt in prompts
        ]
        given = (items, sampling_params, use_tqdm, priority, cache_salt)
        return self._generate(*given, chats, tool_set)

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Returns the embedding of each prompt, in order. Raises RequestError, also for a model
        that makes none."""
        refuse_arguments("LLM.embed", unsupported)
        return self._pool("embed", read_prompts(prompts), pooling_params, use_tqdm, cache_salt)

    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[ClassificationRequestOutput]:
        """Returns the probabilities of the model's labels for each prompt. Raises RequestError."""
        refuse_arguments("LLM.classify", unsupported)
        return self._pool("classify", read_prompts(prompts), pooling_params, use_tqdm, cache_salt)

    def encode(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Returns whatever the model makes of each prompt, as arrays. Raises RequestError."""
        refuse_arguments("LLM.encode", unsupported)
        return self._pool("encode", read_prompts(prompts), pooling_params, use_tqdm, cache_salt)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        instruction: str | None = None,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        cache_salt: str = "",
        **unsupported: Any,
    ) -> list[ScoringRequestOutput]:
        """Returns how well `text_1`, or each of its texts, goes with each of `text_2`.

        A reranker reads both as one prompt, `instruction` included; of an embedding model it is the
        cosine of the two vectors. Raises RequestError.
        """
        refuse_arguments("LLM.score", unsupported)
        pairs = text_pairs(text_1, text_2, ("text_1", "text_2"))
        reader = self._vectors()
        reader.require("score", "embed", what="scores of pairs")
        if reader.spec.kind == "embed":
            if instruction is not None:
                raise RequestError(
                    "instruction has no place beside an embedding; put it into text_1",
                    param="instruction",
                )
            each = list(dict.fromkeys(text for pair in pairs for text in pair))
            items = [GivenPrompt(content=text) for text in each]
            ran = dict(zip(each, self._run_vectors(items, use_tqdm, cache_salt), strict=True))
            return [cosine_output(ran[one], ran[other]) for one, other in pairs]
        writer = self._front_end.pairs
        items = [GivenPrompt(content=writer.ids(*pair, instruction)) for pair in pairs]
        return self._pool("score", items, pooling_params, use_tqdm, cache_salt)

    def _vectors(self) -> VectorReader:
        self._input.check_pools()
        reader = self._front_end.vectors
        assert reader is not None
        return reader

    def _pool(
        self,
        wanted: Wanted,
        items: Sequence[GivenPrompt],
        given: PoolingParams | None,
        use_tqdm: bool,
        cache_salt: str,
    ) -> list[PoolingRequestOutput[Any]]:
        reader = self._vectors()
        params = checked_params(given, wanted, reader)
        return [
            pooled_output(request, delta, reader, params, wanted)
            for request, delta in self._run_vectors(items, use_tqdm, cache_salt)
        ]

    def _run_vectors(
        self, items: Sequence[GivenPrompt], use_tqdm: bool, cache_salt: str
    ) -> list[tuple[Request, OutputDelta]]:
        """Returns each prompt's request, and the delta with its vector."""
        requests = []
        for item in items:
            request = self._input.process_vector(
                f"llm-{self._num_requests}",
                item.content,
                cache_salt=cache_salt if item.cache_salt is None else item.cache_salt,
                arrival_time=time.monotonic(),
            )
            self._num_requests += 1
            requests.append(request)
        collectors = [VectorCollector() for _ in requests]
        for request, collector in zip(requests, collectors, strict=True):
            self._output.open(request, collector)
        self._run(requests, use_tqdm)
        return [(one, found.delta) for one, found in zip(requests, collectors, strict=True)]

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> None:
        """Feeds the core as its queue takes it, and steps until all are finished."""
        todo = sorted(requests, key=_turn)[::-1]
        num_running = len(requests)
        with progress_bar(len(requests)) if use_tqdm else nullcontext() as tell:
            try:
                while num_running:
                    self._feed(todo)
                    self._step()
                    num_running = self._output.num_requests
                    if tell is not None:
                        tell(len(requests) - num_running)
            except BaseException:
                for request in requests:
                    self._core.abort(request.request_id)
                    self._output.close(request.request_id)
                raise

    def _feed(self, todo: list[Request]) -> None:
        while todo:
            try:
                self._core.add(todo[-1])
            except OverloadedError:
                return  # the rest waits here instead of in the queue
            todo.pop()

    def _step(self) -> None:
        for request_id, index in self._output.process(self._core.step(), time.monotonic()):
            self._core.abort(request_id, index)

    def _token_text(self, token_id: int) -> str | None:
        tokenizer = self._front_end.optional_tokenizer
        return None if tokenizer is None else tokenizer.token_text(token_id)

    def close(self) -> None:
        """Lets the runner's thread go, and ends the processes of several engines."""
        self._core.close()


def _turn(request: Request) -> tuple[int, int]:
    """All outputs come together, so what lasts longest begins first: the last steps, which read as
    many weights as others, then have fuller batches. Limits are all that is known of lengths."""
    return request.priority, -(request.params.max_tokens or 0)
