"""The fields that chat and completions share, and their way into SamplingParams.

Called by `protocol.chat` and `protocol.completions`. Every field is known, ignored on purpose, or
refused by name: a misspelt option is never silently dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from octavo.errors import RequestError, shown
from octavo.request import PrefixCaching, SamplingParams
from octavo.request_fields import IGNORED, REFUSED
from octavo.request_limits import (
    MAX_INT,
    MAX_LISTED,
    MAX_LOGPROBS,
    MAX_PARALLEL_SAMPLES,
    SAMPLING_RANGES,
)
from octavo.server.protocol.strict import (
    Priority,
    RequestModel,
    StrictModel,
    Text,
    Texts,
    TokenIds,
    integer,
)
from octavo.server.protocol.structured import StructuredFields


def _number(name: str, description: str) -> Any:
    """Returns a field for a real number; SamplingParams checks it against the same range."""
    low, high = SAMPLING_RANGES[name]
    limits: dict[str, Any] = {"minimum": low, "maximum": high}
    return Field(None, description=description, json_schema_extra=limits)


class StreamOptions(StrictModel):
    """When a stream tells the usage."""

    place = "stream_options."
    ignored_fields = frozenset({"include_obfuscation"})

    include_usage: bool = Field(False, description="Tell the usage in a last chunk.")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage: tell the usage so far in every chunk."
    )


class GenerationFields(RequestModel):
    """What all APIs share in which text is generated. Null or absent: the model's default, else
    OpenAI's."""

    ignored_fields = IGNORED
    refused_fields = REFUSED

    temperature: float | None = _number("temperature", "Randomness; 0 takes the likeliest token.")
    top_p: float | None = _number(
        "top_p", "Keep the likeliest tokens that together have this probability."
    )
    top_k: int | None = integer("Keep so many of the likeliest tokens; 0 or -1 keeps all.", -1)
    min_p: float | None = _number(
        "min_p", "Keep tokens at least this share as likely as the likeliest."
    )
    presence_penalty: float | None = _number(
        "presence_penalty", "Taken from the logits of tokens that the answer has already."
    )
    frequency_penalty: float | None = _number(
        "frequency_penalty", "Taken from the logits of tokens for each time the answer has them."
    )
    repetition_penalty: float | None = _number(
        "repetition_penalty", "Above 1: tokens of prompt and answer become less likely."
    )
    seed: int | None = integer("Same seed, same tokens.", -(2**63), 2**63 - 1)
    stop: Text | Texts | None = Field(None, description="Texts that end the answer.")
    stop_token_ids: TokenIds | None = Field(None, description="Tokens that end the answer.")
    include_stop_str_in_output: bool | None = Field(
        None, description="Leave the text or token that ended the answer in it."
    )
    ignore_eos: bool | None = Field(None, description="Go on after the model's end token.")
    min_tokens: int | None = integer("Tokens before anything may end the answer.", 0)
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text."
    )
    logit_bias: dict[str, float] | None = Field(
        None,
        max_length=MAX_LISTED,
        description="Numbers added to logits, by token id.",
        json_schema_extra={
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": SAMPLING_RANGES["logit_bias"][0],
                "maximum": SAMPLING_RANGES["logit_bias"][1],
            },
        },
    )
    allowed_token_ids: TokenIds | None = Field(None, description="The only tokens to draw from.")
    bad_words: Texts | None = Field(None, description="Words that may not come up.")
    prefix_caching: PrefixCaching | None = Field(
        None, description='Share computed prefixes; "off" neither reads nor writes the cache.'
    )
    skip_reading_prefix_cache: bool | None = Field(
        None, description='The same as prefix_caching "off".'
    )
    stream: bool = Field(False, description="Answer in server-sent events, as tokens come.")
    priority: Priority = Field(
        0, description="Lower runs first; what is allowed besides 0 is the operator's choice."
    )
    cache_salt: Annotated[str, Field(max_length=1024)] = Field(
        "", description="Requests share computed prefixes only with those of the same salt."
    )

    def given_values(self) -> dict[str, Any]:
        """Returns those of these fields that were given."""
        names = GenerationFields.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names}


class SamplingFields(GenerationFields, StructuredFields):
    """What chat and completions share."""

    n: int | None = integer("Samples of each prompt.", 1, MAX_PARALLEL_SAMPLES)
    max_tokens: int | None = integer("Tokens of the answer at most; 0 echoes only.", 0)
    prompt_logprobs: int | None = integer(
        "Tell log-probabilities of the prompt's tokens and of so many others.", 0, MAX_LOGPROBS
    )
    stream_options: StreamOptions | None = Field(None, description="Needs stream: true.")
    echo: bool = Field(
        False,
        description="Put the prompt before the answer; in a chat, the assistant's own last "
        "message, if the messages end with one.",
    )
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = Field(
        None, description="Becomes part of the answer's id, before the header X-Request-Id."
    )
    return_token_ids: bool = Field(False, description="Tell the ids of prompt and answer.")
    return_tokens_as_token_ids: bool = Field(
        False, description="Write tokens in log-probabilities as token_id:123."
    )
    truncate_prompt_tokens: int | None = integer(
        "Keep so many of the last prompt tokens; -1 as many as leave room for the answer.", -1
    )

    def field_name(self, param: str) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        if param.startswith("structured_outputs"):
            return self.structured_field(param)
        return super().field_name(param)

    @property
    def includes_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and options is not None and options.continuous_usage_stats

    def check_size(self) -> None:
        super().check_size()
        self.structured_params()  # which are bounded themselves

    def check_options(self) -> None:
        """Raises RequestError where options contradict each other or make no sense."""
        limit = self.truncate_prompt_tokens
        if limit is not None and limit != -1 and not 1 <= limit <= MAX_INT:
            message = f"truncate_prompt_tokens must be -1 or in 1..{MAX_INT}, got {shown(limit)}"
            raise RequestError(message, param="truncate_prompt_tokens")
        if self.stream_options is not None and not self.stream:
            message = "stream_options is only allowed with stream: true"
            raise RequestError(message, param="stream_options")

    def sampling_params(
        self, defaults: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> SamplingParams:
        """Returns `defaults`, covered by the request's fields, covered by `overrides`.

        Raises RequestError naming the field, the value and the limit.
        """
        values = {name: value for name, value in defaults.items() if name in _PARAM_NAMES}
        for name in self.model_fields_set:
            if name in _PARAM_NAMES and (value := getattr(self, name)) is not None:
                values[name] = value
        if self.logit_bias is not None:
            values["logit_bias"] = _token_ids_as_keys(self.logit_bias)
        if (wanted := self.structured_params()) is not None:
            values["structured_outputs"] = wanted
        if self.skip_reading_prefix_cache and self.prefix_caching in (None, "auto"):
            values["prefix_caching"] = "off"
        values.update(overrides)
        if values.keys() <= _SWITCHES:
            return _of_switches(tuple(values.items()))
        return SamplingParams(**values)


_PARAM_NAMES = frozenset(
    name
    for name in SamplingFields.model_fields
    if name in SamplingParams.__struct_fields__ and name != "structured_outputs"
)
_SWITCHES = _PARAM_NAMES - {
    *("seed", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words")
} | {"logprobs"}
"""Numbers and choices that are the same in most requests."""


@functools.lru_cache(maxsize=256)
def _of_switches(values: tuple[tuple[str, Any], ...]) -> SamplingParams:
    """Returns checked parameters, which requests share: nobody changes those of a request."""
    return SamplingParams(**dict(values))


_MAX_ID_DIGITS = len(str(MAX_INT))


def _token_ids_as_keys(bias: Mapping[str, float]) -> dict[int, float]:
    digits = "".join(bias)  # looked through at C's speed, since 65,536 keys may be
    are_right = not digits or (digits.isascii() and digits.isdigit())
    if not are_right or "" in bias or max(map(len, bias), default=0) > _MAX_ID_DIGITS:
        wrong = next(
            key
            for key in bias
            if not (key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS)
        )
        message = f"logit_bias: {shown(wrong)} is not a token id; keys are integers in 0..{MAX_INT}"
        raise RequestError(message, param="logit_bias")
    return dict(zip(map(int, bias), bias.values(), strict=True))
