"""The bodies of POST /v1/messages and of POST /v1/messages/count_tokens: Anthropic's API.

Parsed for `routes.messages`. Each becomes the body of a chat, which does all the rest; never
touches the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from octavo.engine.chat_template import ChatRenderer
from octavo.errors import RequestError, shown
from octavo.request_fields import Refused
from octavo.server.protocol.chat import ChatRequest, TemplateFields
from octavo.server.protocol.message_blocks import ROLES, chat_messages, system_text
from octavo.server.protocol.message_tools import TOOL_SCHEMA, chat_tools
from octavo.server.protocol.sampling import GenerationFields
from octavo.server.protocol.strict import RequestModel, StrictModel, Texts

MIN_BUDGET = 1024
_BLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"type": "string"}},
    "required": ["type"],
}
_TEXT_BLOCK: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "role": {"enum": [*ROLES]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]},
    },
    "required": ["role", "content"],
}
_SYSTEM: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_BLOCK}, {"type": "null"}]
}


class Thinking(StrictModel):
    """Whether the model reasons before it answers."""

    place = "thinking."

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="disabled: the template is told so, and no thinking blocks come."
    )
    budget_tokens: Annotated[int, Field(ge=MIN_BUDGET)] | None = Field(
        None, description="Tokens of thinking at most, where one token ends it.", le=2**31 - 1
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: the text of thinking blocks stays in their signatures."
    )


class ToolChoice(StrictModel):
    """Whether tools are called."""

    place = "tool_choice."

    type: Literal["auto", "any", "tool", "none"] = Field(description="any: at least one.")
    name: str | None = Field(None, description="For tool: the one that is called.")
    disable_parallel_tool_use: bool = Field(False, description="An answer has one call at most.")

    def for_chat(self) -> str | dict[str, Any]:
        """Returns the same as a chat's. Raises RequestError."""
        if (self.type == "tool") != (self.name is not None):
            message = f"tool_choice.name is for type tool, got type {self.type}, name "
            raise RequestError(message + shown(self.name), param="tool_choice.name")
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class OutputFormat(StrictModel):
    """What the answer's text must be."""

    place = "output_config.format."
    aliases = frozenset({"schema"})

    type: Literal["json_schema"] = Field(description="JSON that fits the schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class OutputConfig(StrictModel):
    """How the model answers."""

    place = "output_config."

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="A variable of the template; changes nothing where it is not read."
    )
    format: OutputFormat | None = Field(None, description="What the answer's text must be.")


class PromptFields(RequestModel):
    """What becomes a prompt."""

    max_quick_bytes = TemplateFields.max_quick_bytes
    max_quick_values = TemplateFields.max_quick_values
    ignored_fields = frozenset(
        {"cache_control", "metadata", "service_tier", "inference_geo", "speed", "diagnostics"}
        | {"context_management", "user_profile_id", "workspace_id", "betas"}
    )
    refused_fields: ClassVar[Refused] = {
        "container": ("the server runs no code", ()),
        "mcp_servers": ("the server connects to no others; bring their tools as tools", ([],)),
        "output_format": ("use output_config.format", ()),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)] = Field(
        description="Objects with role (user, assistant; system where it stands) and content, a "
        "text or a list of blocks: text, tool_result of users, thinking, redacted_thinking and "
        "tool_use of assistants. A last message of the assistant is continued.",
        json_schema_extra={"items": _MESSAGE},
    )
    system: str | list[dict[str, Any]] | None = Field(
        None, description="A text, or a list of text blocks.", json_schema_extra=_SYSTEM
    )
    tools: list[dict[str, Any]] | None = Field(
        None,
        description="Tools that the model may call, each with name and input_schema.",
        json_schema_extra={"items": TOOL_SCHEMA},
    )
    tool_choice: ToolChoice | None = Field(None, description="Whether tools are called.")
    thinking: Thinking | None = Field(
        None, description="Whether the model reasons first; left out: as it is used to."
    )
    output_config: OutputConfig | None = Field(None, description="How the model answers.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the template."
    )
    _chat: ChatRequest | None = PrivateAttr(None)

    def field_name(self, param: str) -> str:
        """Returns the field of this body that a chat's `param` was read from."""
        if param.startswith(("structured_outputs", "response_format")):
            has_format = self.output_config is not None and self.output_config.format is not None
            return "output_config.format" if has_format else "tools"
        if param in ("reasoning_effort", "enable_thinking"):
            return "output_config.effort" if param == "reasoning_effort" else "thinking"
        return "messages" if param == "prompt" else param

    def chat(self) -> ChatRequest:
        """Returns the same as a chat. Raises RequestError naming the field and the block."""
        if self._chat is None:
            self._chat = ChatRequest.model_validate(self._chat_fields())
            self._chat.tool_set()
        return self._chat

    def check_size(self) -> None:
        self.chat().check_size()

    def with_rendered(self, renderer: ChatRenderer) -> Self:
        """Returns a copy that has the text of its chat, and of its messages only the last."""
        less = {"messages": self.messages[-1:], "system": None, "tools": None}
        copy = self.model_copy(update=less)
        copy._chat = self.chat().with_rendered(renderer)
        return copy

    def _chat_fields(self) -> dict[str, Any]:
        messages = chat_messages(self.messages)
        system = "" if self.system is None else system_text(self.system)
        if system:
            messages.insert(0, {"role": "system", "content": system})
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if messages[-1]["role"] == "assistant":
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        fields["chat_template_kwargs"] = self.chat_template_kwargs
        return fields | self._tool_fields() | self._thinking_fields()

    def _tool_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        fields: dict[str, Any] = {"tools": chat_tools(self.tools or [])}
        if choice is None:
            return fields
        if choice.type in ("any", "tool") and not self.tools:
            message = f"tool_choice is {choice.type}, but there are no tools; send some"
            raise RequestError(message, param="tool_choice")
        is_parallel = not choice.disable_parallel_tool_use
        return {**fields, "tool_choice": choice.for_chat(), "parallel_tool_calls": is_parallel}

    def _thinking_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type == "disabled":
            fields |= {"enable_thinking": False, "include_reasoning": False}
        elif self.thinking is not None:
            fields["enable_thinking"] = True
        if self.output_config is not None:
            fields["reasoning_effort"] = self.output_config.effort
            if (wanted := self.output_config.format) is not None:
                schema = {"schema": wanted.schema_}
                fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class CountTokensRequest(PromptFields):
    """A prompt whose tokens are counted."""

    ignored_fields = PromptFields.ignored_fields | {
        *("max_tokens", "stop_sequences", *GenerationFields.model_fields.keys() - {"model"}),
    }


class MessagesRequest(GenerationFields, PromptFields):
    """Anthropic's request for a message."""

    ignored_fields = PromptFields.ignored_fields
    refused_fields = PromptFields.refused_fields

    max_tokens: int = Field(
        description="Tokens of the answer at most, thinking among them; no more than the context "
        "has left.",
        ge=1,
        le=2**31 - 1,
    )
    stop_sequences: Texts | None = Field(None, description="Texts that end the answer.")

    @property
    def hides_thinking(self) -> bool:
        """Whether the text of thinking blocks stays in their signatures."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def thinking_budget(self) -> int | None:
        return None if self.thinking is None else self.thinking.budget_tokens

    def field_name(self, param: str) -> str:
        is_ours = param == "stop" and self.stop is None
        return "stop_sequences" if is_ours else super().field_name(param)

    def _chat_fields(self) -> dict[str, Any]:
        fields = super()._chat_fields() | self.given_values() | {"max_tokens": self.max_tokens}
        if self.stop_sequences and self.stop is not None:
            message = "stop_sequences and stop mean the same; send one"
            raise RequestError(message, param="stop")
        return {**fields, "stop": self.stop_sequences or self.stop}
