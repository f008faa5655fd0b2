"""Owns the way from what a user gave (text or ids, SamplingParams) to a Request that can run.

Called by LLM and AsyncLLM, once per request. Refuses here, with field, value and limit, whatever
the engine could not serve; never changes what was asked for without saying so.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from msgspec import structs

from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.engine.tokenizer import Tokenizer
from octavo.engine.vectors import WRONG_KIND
from octavo.errors import ContextLengthError, RequestError, shown
from octavo.grammar import Checker
from octavo.models.pooling_spec import Kind, PoolingSpec
from octavo.request import NO_SHARE, PrefixCaching, Request, SamplingParams, Share, pack_ids
from octavo.tools.reasoning_tokens import NO_THOUGHT, Thought

SHORT_PROMPT = 128
"""Tokens that are looked at without NumPy."""
_ASKED_FOR: Mapping[Kind, str] = {
    "embed": "/v1/embeddings, or LLM.embed",
    "classify": "/pooling, or LLM.classify",
    "score": "/v1/score or /v1/rerank, or LLM.score",
}
VECTOR_PARAMS: Mapping[PrefixCaching | None, SamplingParams] = {
    choice: SamplingParams(max_tokens=None, detokenize=False, prefix_caching=choice)
    for choice in (None, "auto", "on", "off")
}
"""Of requests that draw no token."""


class InputProcessor:
    """Makes requests for one model. Keeps no state but the newest bad words' spellings."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        pooling: PoolingSpec | None = None,
        checker: Checker | None = None,
    ) -> None:
        """`vocab_size` is the model's, which may be more than the tokenizer knows; `pooling` is
        what it makes of texts in place of tokens; `checker` is the tokenizer's, if there is one
        already."""
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._pooling = pooling
        self._newest_bad_words: tuple[tuple[str, ...], list[tuple[int, ...]]] = ((), [])
        if checker is None and tokenizer is not None:
            checker = Checker(tokenizer.special_strings)
        self._checker = checker

    def knows_grammar(self, wanted: StructuredOutputsParams) -> bool:
        """Whether `constrain` takes no time."""
        return self._checker is not None and self._checker.knows(wanted)

    def constrain(self, wanted: StructuredOutputsParams) -> Constraint:
        """Returns what the engine holds an output to; `process` does the same, but this may be
        called from a thread before it. Raises RequestError with field and reason."""
        if self._checker is None:
            self._needed_tokenizer("structured output", "structured_outputs")
        assert self._checker is not None
        return Constraint(grammar=self._checker.grammar(wanted))

    def process(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        arrival_time: float = 0.0,
        thought: Thought = NO_THOUGHT,
        share: Share = NO_SHARE,
    ) -> Request:
        """Returns the request; what it is held to begins behind `thought`.

        Raises RequestError (ContextLengthError for lengths).
        """
        self.check_generates()
        token_ids = self._ids(prompt)
        packed_prompt = self._packed(token_ids)
        self._check_params(params)
        max_tokens = self._max_tokens(len(token_ids), params.max_tokens)
        if params.bad_words or max_tokens != params.max_tokens:
            bad_words = (*params.bad_words_token_ids, *self._bad_words(params))
            params = structs.replace(params, max_tokens=max_tokens, bad_words_token_ids=bad_words)
        constraint = None
        if params.structured_outputs is not None:
            constraint = self.constrain(params.structured_outputs)
            params = structs.replace(params, structured_outputs=None)
        elif thought.budget is not None:
            constraint = Constraint(grammar="")
        if constraint is not None:
            constraint = replace(
                constraint,
                thought_begins=thought.begins,
                thought_ends=thought.ends,
                starts_inside=thought.starts_inside,
                thought_budget=thought.budget,
            )
        return Request(
            request_id=request_id,
            packed_prompt=packed_prompt,
            params=params,
            constraint=constraint,
            eos_token_ids=self.eos_token_ids,
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=cache_salt,
            share=share,
        )

    def check_generates(self) -> None:
        """Raises RequestError for a model that does not."""
        if self._pooling is not None:
            raise RequestError(
                f"the model is {self._pooling.described}: it generates no text; ask for "
                f"{_ASKED_FOR[self._pooling.kind]}",
                param="model",
                code=WRONG_KIND,
            )

    def check_pools(self) -> PoolingSpec:
        """Returns what the model makes of texts. Raises RequestError if it only generates."""
        if self._pooling is None:
            raise RequestError(
                "the model is a generation model: it makes no vectors or scores of texts; start "
                "it with --runner pooling, or serve an embedding model or a reranker",
                param="model",
                code=WRONG_KIND,
            )
        return self._pooling

    def process_vector(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        priority: int = 0,
        cache_salt: str = "",
        arrival_time: float = 0.0,
        prefix_caching: PrefixCaching | None = None,
        share: Share = NO_SHARE,
    ) -> Request:
        """Returns a request for the vector of a prompt. Raises RequestError (ContextLengthError for
        lengths)."""
        pooling = self.check_pools()
        token_ids = self._ids(prompt)
        packed_prompt = self._packed(token_ids)
        if len(token_ids) > self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens, but the context holds "
                f"{self.max_model_len}; shorten the text"
            )
        return Request(
            request_id=request_id,
            packed_prompt=packed_prompt,
            params=VECTOR_PARAMS[prefix_caching],
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=cache_salt,
            share=share,
            wants_vector=True,
            needs_all_states=pooling.needs_all_states,
        )

    def _ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if not isinstance(prompt, str):
            return prompt
        token_ids = self._needed_tokenizer("a text prompt", "prompt").encode(prompt)
        if not token_ids:
            raise RequestError("the prompt has no tokens; give some text", param="prompt")
        return token_ids

    def _packed(self, token_ids: Sequence[int]) -> bytes:
        is_packed = isinstance(token_ids, array) and token_ids.typecode == "I"
        if is_packed and len(token_ids) <= SHORT_PROMPT and max(token_ids) < self.vocab_size:
            return pack_ids(token_ids)  # looked through before NumPy would have begun
        # Prompts have 100,000 ids, and nearly all prompts are right: looked through at C's speed.
        with suppress(TypeError, OverflowError):
            packed = pack_ids(token_ids)
            ids = np.frombuffer(packed, np.uint32)
            is_plain = isinstance(token_ids, array) or not _has_booleans(token_ids, ids)
            if is_plain and np.maximum.reduce(ids) < self.vocab_size:
                return packed
        for place, token_id in enumerate(token_ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise RequestError(
                    f"token ids must be integers, got {shown(token_id)} at position {place}",
                    param="prompt",
                )
            self._check_id(token_id, "prompt", f" at position {place}")
        return pack_ids(token_ids)

    def _max_tokens(self, prompt_len: int, wanted: int | None) -> int:
        """Returns the output limit; None takes what the context leaves."""
        room = self.max_model_len - prompt_len
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_len} tokens, but the context holds {self.max_model_len} "
                "and one of them must be left for output; shorten the prompt"
            )
        if wanted is not None and wanted > room:
            raise ContextLengthError(
                f"the prompt has {prompt_len} tokens and max_tokens is {wanted}, together "
                f"{prompt_len + wanted}, but the context holds {self.max_model_len}; shorten the "
                f"prompt or set max_tokens to at most {room}",
                param="max_tokens",
            )
        return room if wanted is None else wanted

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            token_ids = getattr(params, name)
            if token_ids:
                self._check_id(max(token_ids), name)
        for word in params.bad_words_token_ids:
            if not word:
                raise RequestError(
                    "bad_words_token_ids has an empty entry; give at least one id each",
                    param="bad_words_token_ids",
                )
            for token_id in word:
                self._check_id(token_id, "bad_words_token_ids")
        if params.stop:
            self._needed_tokenizer("stop", "stop")
            if not params.detokenize:
                raise RequestError(
                    "stop strings need text, but detokenize is false; set it to true or use "
                    "stop_token_ids",
                    param="stop",
                )

    def _check_id(self, token_id: int, param: str, where: str = "") -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"{param} has token id {shown(token_id)}{where}, but the vocabulary has "
                f"{self.vocab_size} tokens: 0..{self.vocab_size - 1}",
                param=param,
            )

    def _bad_words(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Returns the ids of each bad word as it stands at the start of a text, after a space and
        within one."""
        words, found = self._newest_bad_words
        if words is not params.bad_words:  # a call of 1,000 prompts has the same ones
            found = self._spelt(params)
            self._newest_bad_words = (params.bad_words, found)
        return found

    def _spelt(self, params: SamplingParams) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            tokenizer = self._needed_tokenizer("bad_words", "bad_words")
            spellings = _spellings(tokenizer, word)
            if not spellings:
                raise RequestError(
                    f"bad_words has {shown(word)}, which the model's tokenizer cannot write; "
                    "leave it out",
                    param="bad_words",
                )
            found |= dict.fromkeys(spellings)
        return list(found)

    def _needed_tokenizer(self, what: str, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{what} needs a tokenizer, but the engine runs without one "
                "(skip_tokenizer_init); give token ids instead",
                param=param,
            )
        return self.tokenizer


def _has_booleans(token_ids: Sequence[int], ids: np.ndarray) -> bool:
    small = np.flatnonzero(ids <= 1).tolist()  # only 0 and 1 can be booleans
    return any(isinstance(token_ids[place], bool) for place in small)


_ANCHOR = "\x01"
"""Text that no token of more than this character contains."""


def _spellings(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """Returns the ids that write `word`, or one with a space before it.

    SentencePiece puts a space before the first word of a text; within one the word stands without.
    """
    stem = word if word.isspace() else word.lstrip(" ")
    at_start, after_space, anchor, within = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (stem, " " + stem, _ANCHOR, _ANCHOR + stem)
    )
    # What puts a space before every text by itself has both in one.
    has_prefix = tokenizer.token_bytes(at_start[0])[:1] == b" " if at_start else False
    found = [at_start] if has_prefix and not stem.isspace() else [at_start, after_space]
    if within[: len(anchor)] == anchor:
        found.append(within[len(anchor) :])
    return [ids for ids in dict.fromkeys(found) if ids and _writes(tokenizer, ids, stem)]


def _writes(tokenizer: Tokenizer, ids: tuple[int, ...], word: str) -> bool:
    """Whether ids are the word's and not what a tokenizer puts in its place: nothing but a space,
    or a sign for the unknown. Some tokenizers change letters (case, composed characters)."""
    text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    is_exact = word in text
    has_special = any(map(tokenizer.is_special, ids))
    return is_exact or not (word.isspace() or has_special or text.isspace())
