"""What a user asks for, and what the engine says of it: SamplingParams, Request, TokenDelta.

Shared by every layer. A Request is frozen when it enters the engine; everything that changes
afterwards belongs to the scheduler's Sequence or to the detokeniser.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import structs

from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.errors import RequestError, shown
from octavo.moments import Moment
from octavo.request_fields import REFUSED_PARAMS, refuse_field
from octavo.request_limits import (
    MAX_INT,
    MAX_LISTED,
    MAX_LOGPROBS,
    MAX_PARALLEL_SAMPLES,
    MAX_TEXTS,
    SAMPLING_RANGES,
    Array,
    are_ids,
    is_int,
    is_number,
)

PrefixCaching = Literal["auto", "on", "off"]


class FinishReason(StrEnum):
    """Why a sequence ended; every sequence ends with exactly one. The values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    CONTENT_FILTER = "content_filter"
    """Of the server alone: its guard ended the sequence."""


class _Sifting(msgspec.StructMeta):
    """Takes from the arguments of SamplingParams(...) what asks for nothing, and refuses by name
    and reason what is not known; a struct alone would raise a bare TypeError."""

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **values: Any) -> Any:  # noqa: N805
            if not values.keys() <= _DEFAULTS.keys():
                values = {k: v for k, v in values.items() if k in _DEFAULTS or _is_needed(k, v)}
            return super().__call__(*args, **values)


def _is_needed(name: str, value: Any) -> Literal[False]:
    """Returns False for a field of vLLM's that asks for nothing. Raises RequestError for others."""
    if name not in REFUSED_PARAMS:
        near = difflib.get_close_matches(name, _DEFAULTS, 1, 0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"SamplingParams has no field {name!r}{hint}"
        raise RequestError(message, param=name, code="unknown_field")
    refuse_field(name, value, REFUSED_PARAMS)
    return False


_PLAIN = frozenset({int, float, bool, str, type(None), tuple, list, dict})
_LOGPROBS = frozenset({"logprobs", "prompt_logprobs"})
_ID_LISTS = frozenset({"stop_token_ids", "allowed_token_ids"})
_RANGES = tuple(one for one in SAMPLING_RANGES.items() if one[0] != "logit_bias")
_SEQUENCES = _ID_LISTS | frozenset({"stop", "bad_words"})


class SamplingParams(msgspec.Struct, metaclass=_Sifting, kw_only=True, omit_defaults=True):
    """How tokens are drawn and when a sequence ends. Names and defaults are vLLM's.

    Fields may be changed; whoever uses the parameters takes a `clone` of them, which checks them
    again. Raises RequestError (naming the field, the value and the limit) on values that make no
    sense.
    """

    n: int = 1
    """Parallel samples of one prompt; the prompt is computed once."""
    temperature: float = 1.0
    """0 is greedy, and so is what is below 1e-5."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the most likely one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: until the context is full."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Most likely tokens to report for each output position, beside the drawn one."""
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """Filled in by the tokenizer from `bad_words`."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must be: JSON of a schema, a pattern, one of some texts, a grammar."""
    prefix_caching: PrefixCaching | None = None
    """None: as the engine is set. "off" neither reads nor writes the prefix cache."""

    def __post_init__(self) -> None:
        # Most fields are left as they are, and need no look: this is done for every request.
        given = {name for name, value in _DEFAULT_ITEMS if getattr(self, name) is not value}
        self._normalise_sequences(given)
        self._check_numbers(given)
        self._check_lists(given)

    def _normalise_sequences(self, given: Set[str]) -> None:
        """Lists, single strings and what NumPy and torch have are welcome at the face; inside,
        there are plain numbers and tuples."""
        for name in given:
            value = getattr(self, name)
            if type(value) not in _PLAIN and isinstance(value, Array):
                setattr(self, name, value.tolist())
        stop: object = self.stop
        if isinstance(stop, str):
            self.stop = (stop,)
        for name in _SEQUENCES & given:
            value = getattr(self, name)
            if value is None and name != "allowed_token_ids":
                setattr(self, name, ())
            elif isinstance(value, Sequence) and not isinstance(value, (str, tuple)):
                setattr(self, name, tuple(value))
        if "bad_words_token_ids" in given:
            self.bad_words_token_ids = tuple(tuple(ids) for ids in self.bad_words_token_ids)
        if self.top_k == -1:
            self.top_k = 0

    def _check(self, name: str, is_valid: bool, limit: str, *numbers: float | None) -> None:
        """`limit` is filled with its numbers when it is said: nearly all values are valid."""
        if not is_valid:
            wanted = limit.format(*numbers)
            message = f"{name} must be {wanted}, got {shown(getattr(self, name))}"
            raise RequestError(message, param=name)

    def _check_numbers(self, given: Set[str]) -> None:
        most = MAX_PARALLEL_SAMPLES
        if "n" in given:
            self._check("n", is_int(self.n, 1, most), "an integer in 1..{}", most)
        for name, (low, high) in _RANGES:
            if name in given:
                is_valid = is_number(getattr(self, name), low, high)
                self._check(name, is_valid, "a number in {:g}..{:g}", low, high)
        if "top_k" in given:
            self._check("top_k", is_int(self.top_k, 0), "an integer in -1..{}", MAX_INT)
        if "seed" in given:
            low, high = -(2**63), 2**63 - 1
            is_valid = self.seed is None or is_int(self.seed, low, high)
            self._check("seed", is_valid, "null or an integer in {}..{}", low, high)
        most = self.max_tokens
        if "max_tokens" in given:
            is_valid = most is None or is_int(most, 1)
            self._check("max_tokens", is_valid, "null or an integer in 1..{}", MAX_INT)
        if "min_tokens" in given:
            self._check("min_tokens", is_int(self.min_tokens, 0), "an integer in 0..{}", MAX_INT)
            is_valid = most is None or self.min_tokens <= most
            self._check("min_tokens", is_valid, "at most max_tokens ({})", most)
        for name in _LOGPROBS & given:
            value = getattr(self, name)
            is_valid = value is None or is_int(value, 0, MAX_LOGPROBS)
            self._check(name, is_valid, "an integer in 0..{}", MAX_LOGPROBS)

    def _check_lists(self, given: Set[str]) -> None:
        for name in MAX_TEXTS.keys() & given:
            value = getattr(self, name)
            is_valid = isinstance(value, tuple) and all(isinstance(s, str) and s for s in value)
            self._check(name, is_valid, "a list of non-empty strings")
            num, num_chars = len(value), sum(map(len, value))
            most, most_chars = MAX_TEXTS[name]
            if num > most or num_chars > most_chars:
                message = (
                    f"{name} has {num} texts of together {num_chars} characters; at most "
                    f"{most} texts of {most_chars} characters are taken"
                )
                raise RequestError(message, param=name)
        for name in _ID_LISTS & given:
            value = getattr(self, name)
            is_valid = value is None or (isinstance(value, tuple) and are_ids(value))
            limit = "a list of at most {} token ids, integers in 0..{}"
            self._check(name, is_valid, limit, MAX_LISTED, MAX_INT)
        if "allowed_token_ids" in given:
            is_valid = self.allowed_token_ids != ()
            self._check("allowed_token_ids", is_valid, "null or a non-empty list")
        if "logit_bias" in given:
            self._check_bias()
        if "structured_outputs" in given:
            is_valid = isinstance(self.structured_outputs, StructuredOutputsParams)
            self._check("structured_outputs", is_valid, "null or StructuredOutputsParams")
        if "prefix_caching" in given:
            is_valid = self.prefix_caching in ("auto", "on", "off")
            self._check("prefix_caching", is_valid, "one of auto, on, off")

    def _check_bias(self) -> None:
        low, high = SAMPLING_RANGES["logit_bias"]
        bias = self.logit_bias or {}
        is_valid = (
            isinstance(bias, Mapping)
            and are_ids(bias)
            and set(map(type, bias.values())) <= {int, float}
            and all(low <= b <= high for b in bias.values())
        )
        limit = "a map from at most {} token ids in 0..{} to numbers in {:g}..{:g}"
        self._check("logit_bias", is_valid, limit, MAX_LISTED, MAX_INT, low, high)

    def clone(self) -> SamplingParams:
        """Returns a copy, checked as a new one is."""
        return structs.replace(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


_DEFAULTS = {one.name: one.default for one in structs.fields(SamplingParams)}
_DEFAULT_ITEMS = tuple(_DEFAULTS.items())


def checked_copy(given: object) -> SamplingParams:
    """Returns a checked copy of what a user gave, who may change his later. Raises RequestError."""
    if isinstance(given, SamplingParams):
        return given.clone()
    message = f"sampling_params must be SamplingParams, got {type(given).__name__}"
    raise RequestError(message, param="sampling_params")


_ID_BYTES = array("i").itemsize


def pack_ids(token_ids: Iterable[int]) -> bytes:
    """Returns ids of 32 bits in the machine's order. Raises TypeError or OverflowError for others,
    negative ones among them."""
    if isinstance(token_ids, array) and token_ids.typecode == "I":
        return token_ids.tobytes()
    # Lists and tuples are read at once; bytes would be taken for packed ids already.
    ids = token_ids if isinstance(token_ids, list | tuple) else list(token_ids)
    # Unsigned ones take a third of the time, since Python checks signed ones through a format.
    return array("I", ids).tobytes()


class PackedPrompt:
    """A prompt's ids as `pack_ids` makes them: 100,000 of them are sent, kept and hashed as one
    piece of memory, not one by one."""

    __slots__ = ()
    packed_prompt: bytes

    @property
    def prompt_len(self) -> int:
        return len(self.packed_prompt) // _ID_BYTES

    @property
    def prompt_token_ids(self) -> list[int]:
        """The ids one by one, made anew."""
        return array("i", self.packed_prompt).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a tenant gets where others have work, too. Not checked: operators set it."""

    tenant: str = ""
    weight: float = 1.0
    """Its part of computed tokens, rows and room, in proportion to those of the others."""
    kv_share: float = 1.0
    """Part of the KV cache that its running sequences hold at most when one more starts."""


NO_SHARE = Share()
NAMED = "tenant:"
"""How the ids of tenants begin that have a name; those of others are digests."""


class Request(PackedPrompt, msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What enters the engine. Owns `params.n` sequences.

    Raises RequestError for a priority out of range.
    """

    request_id: str
    packed_prompt: bytes
    params: SamplingParams
    """Without `structured_outputs`, which have become `constraint`."""
    constraint: Constraint | None = None
    """What the engine holds every sequence to."""
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0
    """Seconds of the caller's monotonic clock."""
    priority: int = 0
    """Lower runs first, as in vLLM; equal ones first come first served."""
    cache_salt: str = ""
    """Separates prefix caches of tenants; bound by the server to the key."""
    is_traced: bool = False
    """Whether what happens to it in the engine is told (`TokenDelta.moments`)."""
    share: Share = NO_SHARE
    """Whose it is, and what it gets beside others'."""
    wants_vector: bool = False
    """Whether it ends with its prompt, and the vector that the model makes of that."""
    needs_all_states: bool = False
    """Whether that is made of more than the last hidden state: of a cached prefix there are none,
    so that it is computed again."""

    @property
    def tenant(self) -> str:
        """Whose it is: who asks what is cached is told of no other's."""
        return self.share.tenant

    def __post_init__(self) -> None:
        if not is_int(self.priority, -MAX_INT):
            limit = f"an integer in {-MAX_INT}..{MAX_INT}"
            message = f"priority must be {limit}, got {shown(self.priority)}"
            raise RequestError(message, param="priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's natural-log probability at one position."""

    token_id: int
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = tuple[Logprob, ...]
"""The token itself first, then the most likely ones, best first."""


class PackedLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a prompt's positions from the second on, as they cross processes: three
    pieces of memory, since 350,000 objects would take a third of a second to read."""

    token_ids: bytes
    """int32 [positions, width]: the token itself first, then the most likely ones."""
    logprobs: bytes
    """float32 [positions, width]"""
    ranks: bytes
    """int32 [positions], of the tokens themselves"""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the engine core says of one sequence after a step (crosses processes).

    A Struct and not a dataclass, which would take ten times as long to make: a step of 256
    sequences makes 256 of them, of the first five fields alone.
    """

    request_id: str
    index: int
    """Which of the request's `n` sequences."""
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    scheduled_time: float | None = None
    """When the request first entered a step, with its first token; seconds of `monotonic`."""
    logprobs: tuple[PositionLogprobs, ...] = ()
    """Parallel to `token_ids` where asked, else empty."""
    prompt_logprobs: PackedLogprobs | None = None
    """Once, with the first token, where asked."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop id that ended it (None for EOS); or the message of an error."""
    vector: bytes | None = None
    """float32, of a request that wants one, with its finish reason."""
    moments: tuple[Moment, ...] = ()
    """Of a traced request: what has happened since it was told last."""
