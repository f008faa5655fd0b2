"""What the server needs of an engine: the Engine and ServerTokenizer protocols.

Implemented by AsyncLLM (and by a fake in the tests); called by the routes. Owns no code: the server
speaks to the engine through these methods alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.engine.chat_template import ChatRenderer, RenderedChat
from octavo.engine.detokenizer import Pieces
from octavo.engine.pairs import PairWriter
from octavo.engine.vectors import VectorReader
from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.outputs import Receiver
from octavo.request import NO_SHARE, PrefixCaching, Request, SamplingParams, Share
from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought


class ServerTokenizer(Pieces, Protocol):
    """Text to ids and back. Safe to call from worker threads, in which encoding and decoding give
    the GIL back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns ids. Raises RequestError."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns the vocabulary's spelling of each id."""
        ...

    @property
    def longest_spelling(self) -> int | None:
        """Characters of a text that one token stands for at most; None: any number."""
        ...

    @property
    def chat_renderer(self) -> ChatRenderer:
        """From messages to their text. Raises ChatTemplateError if the model has no template."""
        ...

    def encode_rendered(self, rendered: RenderedChat) -> list[int]:
        """Returns the ids of what `chat_renderer` made of messages."""
        ...


class Engine(Protocol):
    """A running engine. All methods may be called from one event loop at once."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def plan(self) -> MemoryPlan | None:
        """What goes where in the memory, if it is known."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at once."""
        ...

    @property
    def max_num_queued_requests(self) -> int:
        """Requests that may wait."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and requests are taken."""
        ...

    @property
    def tokenizer(self) -> ServerTokenizer: ...

    @property
    def answer_format(self) -> AnswerFormat | None:
        """How the model writes calls and reasoning; None if it is not known."""
        ...

    @property
    def default_sampling_params(self) -> Mapping[str, Any]:
        """Values of the model's generation config, named as in SamplingParams."""
        ...

    @property
    def vectors(self) -> VectorReader | None:
        """How vectors are told; None for a model that generates."""
        ...

    @property
    def pairs(self) -> PairWriter:
        """How a query and a document become a prompt, of a model that scores them. Safe to use from
        threads."""
        ...

    def check_generates(self) -> None:
        """Raises RequestError for a model that does not, saying what it is."""
        ...

    def prepare_vector(
        self,
        prompt: str | Sequence[int],
        *,
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: PrefixCaching | None = None,
        share: Share = NO_SHARE,
    ) -> Request:
        """Returns a request for the vector of a prompt. Raises RequestError, also for a model that
        has none, and EngineDeadError."""
        ...

    def knows_grammar(self, wanted: StructuredOutputsParams) -> bool:
        """Whether `constrain` takes no time."""
        ...

    def constrain(self, wanted: StructuredOutputsParams) -> Constraint:
        """Returns what an output is held to; may be called from a thread, so that `prepare` need
        not wait for it. Raises RequestError with field and reason."""
        ...

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
        """Returns a request under an id of its own. Raises RequestError, EngineDeadError."""
        ...

    def submit(
        self, request: Request, receiver: Receiver, marks: Mapping[int, str] | None = None
    ) -> None:
        """Hands a request over; `receiver` is told of its progress in the event loop. `marks` stand
        in its text for the tokens of these ids.

        Raises OverloadedError, EngineDeadError.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request without a word to its receiver; a late call is harmless."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. Returns False if running requests still hold blocks."""
        ...

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        """Returns what is cached of the prompt of a prepared request, which does not run. Raises
        EngineDeadError."""
        ...

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine has ended. Never waits for its answer."""
        ...

    def begin_drain(self) -> None:
        """The server ends: from now on a step without progress is not waited for as long."""
        ...

    def hand_back(self) -> int:
        """Fails what has not begun with PreemptedError; returns how many requests that were."""
        ...

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        """Returns a snapshot; `is_detailed`: of each expert and each sequence, too. Raises
        EngineDeadError."""
        ...
