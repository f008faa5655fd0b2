"""The body of POST /v1/completions.

Parsed for `routes.completions`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.request_limits import MAX_LOGPROBS
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.protocol.strict import PackedIds, TokenId, integer, packed_ids

MAX_PROMPTS = 1024
"""Prompts in one call."""


def check_prompt(prompt: object, name: str = "prompt", most: int = MAX_PROMPTS) -> object:
    """Returns `prompt` if it is a text, ids, or a list of one of them, at most so many. Raises
    RequestError, which calls it `name`.

    Its first element says what all must be, and ids are packed at C's speed: pydantic would try
    all four kinds on each of 100,000 ids. Whether the vocabulary has them is the engine's to say.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise RequestError(f"{name} must be {_KINDS}", param=name)
    if prompt and isinstance(prompt[0], list | str) and len(prompt) > most:
        message = f"{name} holds {len(prompt)} prompts; at most {most} fit in one call"
        raise RequestError(message, param=name)
    if prompt and isinstance(prompt[0], list):
        return [packed_ids(ids, f"{name}[{index}]", name) for index, ids in enumerate(prompt)]
    if prompt and isinstance(prompt[0], str):
        if set(map(type, prompt)) != {str}:
            message = f"{name} holds texts and other things; send one kind"
            raise RequestError(message, param=name)
        return prompt
    return packed_ids(prompt, name, name)


_KINDS = "a text, a list of texts, a list of token ids or a list of such lists"
_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Many = Annotated[list[str] | list[_Ids], Field(min_length=1)]
Prompt = Annotated[
    str | list[str] | PackedIds | list[PackedIds],
    PlainValidator(check_prompt, json_schema_input_type=str | _Ids | _Many),
]


class CompletionRequest(SamplingFields):
    """OpenAI's completion request with vLLM's additions."""

    # Ids are looked through at C's speed, twenty a microsecond.
    max_quick_values = 32 * 1024

    prompt: Prompt = Field(description="A text, token ids, or a list of one of them.")
    logprobs: int | None = integer(
        "Tell log-probabilities of the tokens and of so many of the likeliest.", 0, MAX_LOGPROBS
    )
    add_special_tokens: bool = Field(
        True, description="Put before a text what the model wants before texts."
    )

    @property
    def is_prompt_only(self) -> bool:
        """Whether the prompt is echoed and nothing is generated (`max_tokens` 0)."""
        return self.echo and self.max_tokens == 0

    def prompts(self) -> list[str | PackedIds]:
        """Returns one text or the ids of each prompt. Raises RequestError if empty."""
        prompt = self.prompt
        if not prompt:
            raise RequestError("prompt is empty; send at least one token", param="prompt")
        return [*prompt] if isinstance(prompt, list) else [prompt]

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Returns how to sample. Raises RequestError."""
        self.check_options()
        overrides: dict[str, Any] = {"logprobs": self.logprobs}
        if self.is_prompt_only:
            overrides["max_tokens"] = 1
        if self.echo and self.logprobs is not None:
            overrides["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return self.sampling_params(defaults, overrides)
