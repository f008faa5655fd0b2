"""The body of POST /v1/chat/completions, and of all that goes through the chat template.

Parsed for `routes.chat` and `routes.tokens`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from octavo.engine.chat_template import ChatOptions, ChatRenderer, RenderedChat
from octavo.engine.messages import ROLES, read_messages
from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.request_fields import IGNORED, REFUSED
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.protocol.strict import RequestModel, integer

Messages = Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_OWN_FIELDS = {
    *("messages", "documents", "tools", "add_generation_prompt", "continue_final_message"),
    "chat_template",
}
MAX_TOP_LOGPROBS = 20
"""OpenAI's limit."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "role": {"enum": [*ROLES]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": _TEXT_PART},
                {"type": "null"},
            ]
        },
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "reasoning": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "reasoning_content": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["role"],
}
"""What `read_messages` takes, for the description of the API."""


class TemplateFields(RequestModel):
    """What becomes a prompt through the chat template."""

    # Special tokens are looked for in the text, and messages are read and rendered in Python.
    max_quick_bytes = 64 * 1024
    max_quick_values = 1024
    ignored_fields = IGNORED
    refused_fields = REFUSED

    messages: Messages = Field(
        description="Objects with role (system, developer, user, assistant), content (a text or a "
        "list of text parts), optionally name, and the reasoning of an assistant's message.",
        json_schema_extra={"items": MESSAGE_SCHEMA},
    )
    add_generation_prompt: bool = Field(True, description="End with the answer's header.")
    continue_final_message: bool = Field(
        False, description="Go on with the last message; needs add_generation_prompt: false."
    )
    add_special_tokens: bool = Field(
        False, description="Must be false: the template adds what the model needs."
    )
    documents: list[dict[str, Any]] | None = Field(
        None, description="For templates that read documents; refused by those that do not."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Variables of the template, such as enable_thinking; those that it does not "
        "read change nothing.",
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="A variable of the template; changes nothing where it is not read."
    )
    _rendered: RenderedChat | None = PrivateAttr(None)

    def field_name(self, param: str) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        return "messages" if param == "prompt" else param

    def template_messages(self) -> list[dict[str, str]]:
        """Returns the messages as text. Raises RequestError naming the message and the field."""
        if self.add_special_tokens:
            message = "add_special_tokens has no meaning in chat: the template adds what it needs"
            raise RequestError(message, param="add_special_tokens")
        return read_messages(self.messages)

    @property
    def rendered(self) -> RenderedChat | None:
        """The text of the chat, if it was rendered where it was parsed."""
        return self._rendered

    def render(self, renderer: ChatRenderer) -> RenderedChat:
        """Returns the text of the chat. Raises RequestError, ChatTemplateError among them."""
        options = ChatOptions(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            documents=self.documents,
            template_kwargs=self.template_kwargs(),
        )
        return renderer.render(self.template_messages(), options)

    def with_rendered(self, renderer: ChatRenderer) -> Self:
        """Returns a copy that has the text of the chat, and of its messages only the last."""
        rendered = self.render(renderer)
        less = {
            "messages": read_messages(self.messages[-1:]),
            "documents": None,
            "chat_template_kwargs": None,
        }
        copy = self.model_copy(update=less)
        copy._rendered = rendered
        return copy

    def template_kwargs(self) -> dict[str, Any]:
        """Returns the variables that the template gets beside the messages. Raises RequestError
        for those that have a field of their own, which would win."""
        kwargs = dict(self.chat_template_kwargs or {})
        for name in _OWN_FIELDS & kwargs.keys():
            if kwargs.pop(name) is not None:
                message = f"chat_template_kwargs has {name}; send it as a field of the body"
                raise RequestError(message, param=f"chat_template_kwargs.{name}")
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        return kwargs


class ChatRequest(SamplingFields, TemplateFields):
    """OpenAI's chat completion request with vLLM's additions."""

    param_defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}
    """Where they are not those of SamplingParams."""

    logprobs: bool = Field(False, description="Tell log-probabilities of the answer's tokens.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Tell those of so many of the likeliest tokens; needs logprobs: true."
    )
    max_tokens: int | None = integer(
        "Tokens of the answer at most; if left out, what the context has left.", 1
    )
    max_completion_tokens: int | None = integer("The same as max_tokens, and before it.", 1)

    def field_name(self, param: str) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().field_name(param)

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
        return self.sampling_params({**self.param_defaults, **defaults}, overrides)

    def echoed_text(self) -> str:
        """Returns what `echo` puts before the answer: a final message of the assistant."""
        final = self.template_messages()[-1]
        return final["content"] if self.echo and final["role"] == "assistant" else ""
