"""Texts and chats to token ids and back, without holding the event loop.

Called by the routes. Short texts are tokenised at once, longer ones in threads, where the tokenizer
gives the GIL back; what cannot fit the context is refused by its length before that.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from octavo.constraint import StructuredOutputsParams
from octavo.engine.chat_template import RenderedChat
from octavo.errors import ContextLengthError, OverloadedError, RequestError
from octavo.server.engine_client import Engine, ServerTokenizer
from octavo.server.protocol.chat import TemplateFields
from octavo.server.protocol.completions import CompletionRequest

SHORT_CHARS = 4096
"""Tokenised in about a millisecond; longer texts go to a thread."""
LONG_CHARS = 256 * 1024
"""Longer ones have half of the threads at most: others do not wait for them."""
NUM_THREADS = 4
MAX_WAITING_CHARS = 64 * 2**20
"""Of all texts in threads and before them."""

T = TypeVar("T")


class Tokenising:
    """The way of one server's texts to ids. Use it from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenise")
        self._long_turn = asyncio.Semaphore(NUM_THREADS // 2)
        self._num_waiting_chars = 0
        self._max_chars = _max_chars(engine)

    @property
    def _tokenizer(self) -> ServerTokenizer:
        return self._engine.tokenizer

    def check_length(self, num_chars: int, param: str) -> None:
        """Raises ContextLengthError if no text of so many characters fits the context."""
        limit = self._max_chars
        if limit is not None and num_chars > limit:
            raise ContextLengthError(
                f"{param} has {num_chars} characters, but the {self._engine.max_model_len} tokens "
                f"of the context spell at most {limit}; shorten the text",
                param=param,
            )

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[Sequence[int]]:
        """Returns the ids of each text, packed in arrays. Raises RequestError, OverloadedError."""
        tokenizer = self._tokenizer
        for text in texts:
            self.check_length(len(text), "prompt")

        def work() -> list[Sequence[int]]:
            return [array("I", tokenizer.encode(text, add_special_tokens)) for text in texts]

        return await self._run(work, sum(map(len, texts)))

    async def encode_cut(
        self, texts: Sequence[str], add_special_tokens: bool, limit: int
    ) -> list[Sequence[int]]:
        """As `encode`, with longer texts cut at their end; what the model wants around them stays.
        Raises RequestError, OverloadedError."""
        tokenizer, most = self._tokenizer, self._max_chars

        def work() -> list[Sequence[int]]:
            cut = (text if most is None else text[:most] for text in texts)
            each = (_encoded_cut(tokenizer, text, add_special_tokens, limit) for text in cut)
            return [array("I", ids) for ids in each]

        return await self._run(work, sum(map(len, texts)))

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], instruction: str | None
    ) -> list[Sequence[int]]:
        """Returns the ids of each query with its document. Raises RequestError, OverloadedError."""
        writer = self._engine.pairs
        writer.check_instruction(instruction)
        for pair in pairs:
            self.check_length(sum(map(len, pair)), "prompt")

        def work() -> list[Sequence[int]]:
            return [array("I", writer.ids(*pair, instruction)) for pair in pairs]

        # Templates take longer than their texts say.
        return await self._in_thread(work, sum(len(one) + len(other) for one, other in pairs))

    async def encode_chat(self, body: TemplateFields) -> Sequence[int]:
        """Returns the ids of the messages in the model's chat template.

        Raises RequestError, ChatTemplateError among them, and OverloadedError.
        """
        return await self.encode_rendered(body.rendered or render(self._tokenizer, body))

    async def encode_rendered(self, rendered: RenderedChat) -> Sequence[int]:
        """Returns the ids of a chat's text. Raises ContextLengthError, OverloadedError."""
        tokenizer = self._tokenizer
        self.check_length(len(rendered.text), "messages")

        def work() -> Sequence[int]:
            return array("I", tokenizer.encode_rendered(rendered))

        # What holds special tokens needs a second vocabulary, which is slow to make.
        is_short = len(rendered.text) <= SHORT_CHARS and not rendered.literals
        return work() if is_short else await self._in_thread(work, len(rendered.text))

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`. Raises RequestError, OverloadedError."""
        decode = self._tokenizer.decode
        return await self._run(lambda: decode(ids, skip_special_tokens), len(ids))

    async def tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns the vocabulary's spelling of each id. Raises RequestError, OverloadedError."""
        tokens = self._tokenizer.tokens
        return await self._run(lambda: tokens(ids), len(ids))

    async def constrain(self, wanted: StructuredOutputsParams) -> None:
        """Has a grammar compiled, or refused: what is prepared next finds it there.

        Raises RequestError, OverloadedError.
        """
        engine = self._engine
        if not engine.knows_grammar(wanted):
            await self._in_thread(lambda: engine.constrain(wanted), wanted.num_chars)

    async def _run(self, work: Callable[[], T], size: int) -> T:
        return work() if size <= SHORT_CHARS else await self._in_thread(work, size)

    async def _in_thread(self, work: Callable[[], T], size: int) -> T:
        if self._num_waiting_chars + size > MAX_WAITING_CHARS:
            raise OverloadedError(
                f"texts of {self._num_waiting_chars} characters wait for their tokens already; "
                "try again later"
            )
        self._num_waiting_chars += size
        try:
            loop = asyncio.get_running_loop()
            if size <= LONG_CHARS:
                return await loop.run_in_executor(self._threads, work)
            async with self._long_turn:
                return await loop.run_in_executor(self._threads, work)
        finally:
            self._num_waiting_chars -= size


def render(tokenizer: ServerTokenizer, body: TemplateFields) -> RenderedChat:
    """Returns the text of a chat. Raises RequestError, ChatTemplateError among them."""
    return body.render(tokenizer.chat_renderer)


async def completion_ids(tokenising: Tokenising, body: CompletionRequest) -> list[Sequence[int]]:
    """Returns the ids of each prompt of a completion. Raises RequestError, OverloadedError."""
    given = body.prompts()
    texts = [one for one in given if isinstance(one, str)]
    # All are of one kind: texts, or ids already.
    if texts:
        return await tokenising.encode(texts, body.add_special_tokens)
    return [one for one in given if not isinstance(one, str)]


def _encoded_cut(
    tokenizer: ServerTokenizer, text: str, add_special_tokens: bool, limit: int
) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens)
    if len(ids) <= limit:
        return ids
    plain = tokenizer.encode(text, False) if add_special_tokens else ids
    num_around = len(ids) - len(plain)
    places = range(num_around + 1)
    before = next((n for n in places if ids[n : n + len(plain)] == plain), None)
    if before is None or num_around >= limit:
        return ids[:limit]
    return ids[:before] + plain[: limit - num_around] + ids[before + len(plain) :]


def _max_chars(engine: Engine) -> int | None:
    try:
        longest = engine.tokenizer.longest_spelling
    except RequestError:  # there is no tokenizer: texts are refused anyway
        return None
    return None if longest is None else longest * engine.max_model_len
