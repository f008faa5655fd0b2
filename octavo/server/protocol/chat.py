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
from octavo.server.protocol.strict import RequestModel, check_chars, integer
from octavo.tools.definitions import NAME_PATTERN, Tools, read_tools, with_choice

Messages = Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_OWN_FIELDS = {
    *("messages", "documents", "tools", "add_generation_prompt", "continue_final_message"),
    "chat_template",
}
MAX_TOOLS_CHARS = 512 * 1024
"""Of the JSON of all tools: more than a hundred thousand tokens."""
MAX_SPECIALS = 64 * 1024
"""Spellings of special tokens in one chat, each of which is a text that is none."""
MAX_TOP_LOGPROBS = 20
"""OpenAI's limit."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
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
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
        "tool_call_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["role"],
}
"""What `read_messages` takes, for the description of the API."""


TOOL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function", "custom"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
                "description": {"type": "string"},
                "parameters": {
                    "type": "object",
                    "properties": {"type": {"const": "object"}, "properties": {"type": "object"}},
                },
                "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
"""What `read_tools` takes, but for custom tools."""
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        {"type": "object", "properties": {"type": {"const": "function"}}, "required": ["type"]},
        {"type": "null"},
    ]
}


class TemplateVariables(RequestModel):
    """What a request says to the chat template itself."""

    enable_thinking: bool | None = Field(
        None, description="A variable of the template: whether the model reasons first."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Variables of the template, such as enable_thinking; those that it does not "
        "read change nothing.",
    )


class TemplateFields(TemplateVariables):
    """What becomes a prompt through the chat template."""

    # Special tokens are looked for in the text, and messages are read and rendered in Python.
    max_quick_bytes = 64 * 1024
    max_quick_values = 1024
    ignored_fields = IGNORED
    refused_fields = REFUSED

    messages: Messages = Field(
        description="Objects with role (system, developer, user, assistant, tool), content (a text "
        "or a list of text parts), optionally name, the reasoning and tool_calls of an assistant's "
        "message, and the tool_call_id of a tool's.",
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
    tools: list[dict[str, Any]] | None = Field(
        None,
        description="Functions, or custom tools with a text as input, that the model may call.",
        json_schema_extra={"items": TOOL_SCHEMA},
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="A variable of the template; changes nothing where it is not read."
    )
    _rendered: RenderedChat | None = PrivateAttr(None)
    _tools: Tools | None = PrivateAttr(None)
    _num_messages: int | None = PrivateAttr(None)

    @property
    def num_messages(self) -> int:
        """How many messages were sent, whatever is left of them here."""
        return len(self.messages) if self._num_messages is None else self._num_messages

    def field_name(self, param: str) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        return "messages" if param == "prompt" else param

    def tool_set(self) -> Tools:
        """Returns the tools. Raises RequestError naming the tool and the field."""
        if self._tools is None:
            self._tools = read_tools(self.tools)
        return self._tools

    def check_size(self) -> None:
        super().check_size()
        check_chars(self.tools, "tools", MAX_TOOLS_CHARS)

    def template_messages(self) -> list[dict[str, Any]]:
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
            tools=self.tool_set().for_template(),
            documents=self.documents,
            template_kwargs=self.template_kwargs(),
        )
        return renderer.render(self.template_messages(), options)

    def with_rendered(self, renderer: ChatRenderer) -> Self:
        """Returns a copy that has the text of the chat, and of its messages only the last."""
        rendered = self.render(renderer)
        if len(rendered.literals) > MAX_SPECIALS:
            message = (
                f"messages spell {len(rendered.literals)} special tokens; at most {MAX_SPECIALS} "
                "are taken"
            )
            raise RequestError(message, param="messages")
        less = {
            "messages": self.messages[-1:],
            "tools": None,
            "documents": None,
            "chat_template_kwargs": None,
        }
        copy = self.model_copy(update=less)
        copy._rendered, copy._tools = rendered, self._tools
        copy._num_messages = self.num_messages
        return copy

    def template_kwargs(self) -> dict[str, Any]:
        """Returns the variables that the template gets beside the messages. Raises RequestError
        for those that have a field of their own, which would win."""
        kwargs = dict(self.chat_template_kwargs or {})
        for name in _OWN_FIELDS & kwargs.keys():
            if kwargs.pop(name) is not None:
                message = f"chat_template_kwargs has {name}; send it as a field of the body"
                raise RequestError(message, param=f"chat_template_kwargs.{name}")
        effort, thinks = self.reasoning_effort, self.enable_thinking
        if effort is not None:
            kwargs.setdefault("reasoning_effort", effort)
            thinks = effort != "none" if thinks is None else thinks
        if thinks is not None:
            # Templates know it by either name.
            kwargs = {"enable_thinking": thinks, "thinking": thinks, **kwargs}
        return kwargs


class ChatRequest(SamplingFields, TemplateFields):
    """OpenAI's chat completion request with vLLM's additions."""

    ignored_fields = IGNORED - {"parallel_tool_calls"}
    param_defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}
    """Where they are not those of SamplingParams."""

    tool_choice: str | dict[str, Any] | None = Field(
        None,
        description="auto (the model's choice), none, required (at least one call), or an object "
        "that names a tool, or the allowed ones.",
        json_schema_extra=TOOL_CHOICE_SCHEMA,
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: an answer has one call at most."
    )
    include_reasoning: bool = Field(True, description="False: the reasoning is not told.")
    separate_reasoning: bool = Field(
        True, description="False: the reasoning stays in the content, as the model wrote it."
    )
    thinking_token_budget: int | None = integer(
        "Tokens of the reasoning at most: what ends it comes then; for models whose reasoning one "
        "token ends.",
        0,
    )
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
        if param.startswith("structured_outputs") and not self.is_structured:
            return "tools"
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

    def tool_set(self) -> Tools:
        """Returns the tools, as they are to be called. Raises RequestError."""
        return with_choice(super().tool_set(), self.tool_choice, self.parallel_tool_calls)

    def echoed_text(self) -> str:
        """Returns what `echo` puts before the answer: a final message of the assistant."""
        final = self.template_messages()[-1]
        return final["content"] or "" if self.echo and final["role"] == "assistant" else ""
