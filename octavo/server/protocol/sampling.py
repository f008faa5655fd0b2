"""The fields that chat and completions share, and their way into SamplingParams.

Called by `protocol.chat` and `protocol.completions`. Every field is known, ignored on purpose, or
refused by name: a misspelt option is never silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from octavo.errors import RequestError
from octavo.request import PrefixCaching, SamplingParams
from octavo.server.protocol.strict import (
    Int,
    Refused,
    RequestModel,
    StrictModel,
    Texts,
    TokenIds,
)

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "verbosity"),
        "safety_identifier",
    }
)
"""OpenAI's fields that change nothing here."""

REFUSED: Refused = {
    "best_of": ("ask for n samples and choose", (1,)),
    "use_beam_search": ("beam search is not supported", (False,)),
    "length_penalty": ("beam search is not supported", (1, 1.0)),
    "response_format": ("only plain text is supported", ({"type": "text"},)),
    "structured_outputs": ("only plain text is supported", ({},)),
    "tools": ("tools are not supported", ([],)),
    "tool_choice": ("tools are not supported", ("none", "auto")),
    "functions": ("tools are not supported", ([],)),
    "function_call": ("tools are not supported", ("none", "auto")),
    "modalities": ("only text is supported", (["text"],)),
    "audio": ("only text is supported", ()),
    "web_search_options": ("web search is not supported", ()),
    "moderation": ("moderation is not supported", ()),
    "suffix": ("insertion is not supported", ("",)),
    "prompt_embeds": ("send token ids or text", ()),
    "chat_template": ("a client may not bring a template; start the server with one", ()),
    "truncation_side": ("only the left side is cut", ("left",)),
    "logprob_token_ids": ("use logprobs", ([],)),
    "return_tokens_as_token_ids": ("use return_token_ids", (False,)),
    "thinking_token_budget": ("reasoning is not separated from the text", ()),
}
"""Known elsewhere, not here: what to do instead, and the values that ask for nothing."""


class StreamOptions(StrictModel):
    """When a stream tells the usage."""

    ignored_fields = frozenset({"include_obfuscation"})

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SamplingFields(RequestModel):
    """What chat and completions share. None: the model's default, else OpenAI's."""

    ignored_fields = IGNORED
    refused_fields = REFUSED

    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    prefix_caching: PrefixCaching | None = None
    skip_reading_prefix_cache: bool | None = None

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False
    priority: Int = 0
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] = ""
    return_token_ids: bool | None = False
    truncate_prompt_tokens: Int | None = None
    """Keep this many of the last prompt tokens; -1 as many as leave room for the answer."""

    @property
    def includes_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        options = self.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)

    def check_options(self) -> None:
        """Raises RequestError where options contradict each other or make no sense."""
        limit = self.truncate_prompt_tokens
        if limit is not None and limit != -1 and limit < 1:
            message = f"truncate_prompt_tokens must be -1 or at least 1, got {limit}"
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
        values = {name: defaults[name] for name in _PARAM_NAMES if name in defaults}
        for name in _PARAM_NAMES:
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        if self.logit_bias is not None:
            values["logit_bias"] = _token_ids_as_keys(self.logit_bias)
        if self.skip_reading_prefix_cache and self.prefix_caching in (None, "auto"):
            values["prefix_caching"] = "off"
        values.update(overrides)
        return SamplingParams(**values)


_PARAM_NAMES = tuple(
    name for name in SamplingFields.model_fields if name in SamplingParams.__dataclass_fields__
)


def _token_ids_as_keys(bias: Mapping[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit()):
            message = f"logit_bias: {key!r} is not a token id; keys must be integers of at least 0"
            raise RequestError(message, param="logit_bias")
    return {int(key): value for key, value in bias.items()}
