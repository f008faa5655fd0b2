"""The body of POST /v1/chat/completions, and of all that goes through the chat template.

Parsed for `routes.chat` and `routes.tokens`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from octavo.engine.messages import read_messages
from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.server.protocol.sampling import IGNORED, REFUSED, SamplingFields
from octavo.server.protocol.strict import Int, RequestModel

Messages = Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]


class TemplateFields(RequestModel):
    """What becomes a prompt through the chat template."""

    ignored_fields = IGNORED
    refused_fields = REFUSED

    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def template_messages(self) -> list[dict[str, str]]:
        """Returns the messages as text. Raises RequestError naming the message and the field."""
        if self.add_special_tokens:
            message = "add_special_tokens has no meaning in chat: the template adds what it needs"
            raise RequestError(message, param="add_special_tokens")
        return read_messages(self.messages)

    def template_kwargs(self) -> dict[str, Any]:
        """Returns the variables that the template gets beside the messages."""
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        return kwargs


class ChatRequest(SamplingFields, TemplateFields):
    """OpenAI's chat completion request with vLLM's additions."""

    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Int | None = None

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Returns how to sample. Raises RequestError."""
        self.check_options()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        overrides: dict[str, Any] = {}
        if self.logprobs:
            overrides["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            overrides["max_tokens"] = self.max_completion_tokens
        return self.sampling_params({"max_tokens": None, **defaults}, overrides)

    def echoed_text(self) -> str:
        """Returns what `echo` puts before the answer: a final message of the assistant."""
        final = self.template_messages()[-1]
        return final["content"] if self.echo and final["role"] == "assistant" else ""
