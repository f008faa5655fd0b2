"""The body of POST /v1/completions.

Parsed by FastAPI for `routes.completions`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.server.protocol.sampling import SamplingFields, Text, TokenId

Prompt = Text | list[Text] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(SamplingFields):
    """OpenAI's completion request with vLLM's additions."""

    prompt: Prompt
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def is_prompt_only(self) -> bool:
        """Whether the prompt is echoed and nothing is generated (`max_tokens` 0)."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Returns one text or list of token ids for each prompt. Raises RequestError if empty."""
        prompt = self.prompt
        if not prompt:
            raise RequestError("prompt is empty; send at least one token", param="prompt")
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [one for one in prompt if not isinstance(one, int)]

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Returns how to sample. Raises RequestError."""
        self.check_options()
        overrides: dict[str, Any] = {"logprobs": self.logprobs}
        if self.is_prompt_only:
            overrides["max_tokens"] = 1
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            overrides["prompt_logprobs"] = self.logprobs
        return self.sampling_params(defaults, overrides)
