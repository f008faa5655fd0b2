"""The body of POST /v1/responses, and the chat that it comes to.

Parsed for `routes.responses`; never touches the engine. All that a response and a chat share is
said, checked and refused by the chat: only names and places are turned back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import BaseModel, Field, PrivateAttr

from octavo.constraint import MAX_GRAMMAR_CHARS
from octavo.engine.chat_template import ChatRenderer
from octavo.engine.messages import read_messages
from octavo.errors import RequestError
from octavo.request_fields import IGNORED, REFUSED
from octavo.server.protocol import response_items
from octavo.server.protocol.chat import (
    MAX_TOOLS_CHARS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    ReasoningEffort,
    TemplateFields,
    TemplateVariables,
)
from octavo.server.protocol.files import ListQuery
from octavo.server.protocol.response_items import ChatHistory, chat_history, reference_of
from octavo.server.protocol.sampling import GenerationFields
from octavo.server.protocol.strict import StrictModel, check_chars, integer
from octavo.server.protocol.structured import StructuredOutputs

MAX_METADATA = 16
_LOGPROBS, _PACKED = "message.output_text.logprobs", "reasoning.encrypted_content"
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
]
_ITEM: dict[str, Any] = {"type": "object", "properties": {"type": {"type": "string"}}}
_TOOL: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": ["function", "custom"]}, "name": {"type": "string"}},
    "required": ["type", "name"],
}
_CHOICE: dict[str, Any] = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
        {"type": "null"},
    ]
}
_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}
"""What fields of a chat are called here."""
_REFUSED = {
    **REFUSED,
    "conversation": ("send previous_response_id, or the whole conversation", ()),
    "prompt": ("the server keeps no prompts; send instructions and input", ()),
    "messages": ("send input, or use POST /v1/chat/completions", ()),
    "max_tokens": ("send max_output_tokens", ()),
    "reasoning_effort": ("send reasoning.effort", ()),
    "response_format": ("send text.format", ()),
    "context_management": ("conversations are not compacted", ([],)),
    "n": ("a response is one answer", (1,)),
}


class Reasoning(StrictModel):
    """How much a model reasons, and what is told of it."""

    place = "reasoning."
    ignored_fields = frozenset({"context", "generate_summary", "mode"})

    effort: ReasoningEffort | None = Field(
        None, description="A variable of the template; changes nothing where it is not read."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Changes nothing: a reasoning is told as it is."
    )


class TextFormat(StrictModel):
    """What the text of an answer must be."""

    place = "text.format."
    aliases = frozenset({"schema"})

    type: Literal["text", "json_object", "json_schema"] = Field(description="text: anything.")
    name: str | None = Field(None, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="For json_schema, which needs it: the JSON schema."
    )
    strict: bool | None = Field(None, description="Changes nothing: every schema is held to.")

    def as_response_format(self) -> dict[str, Any]:
        """Returns the same as a chat has it. Raises RequestError."""
        if (self.type == "json_schema") is (self.schema_ is None):
            message = f"text.format of type {self.type} " + (
                "needs a schema" if self.schema_ is None else "has no schema"
            )
            raise RequestError(message, param="text.format.schema")
        if self.schema_ is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"schema": self.schema_}}


class TextOptions(StrictModel):
    """The text of an answer."""

    place = "text."

    format: TextFormat | None = Field(None, description="What the text must be.")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Changes nothing.")


class ItemsQuery(ListQuery):
    """Which of a response's input items."""

    ignored_fields = frozenset({"include[]"})

    order: Literal["asc", "desc"] = Field("desc", description="Last or first items first.")


class RetrieveQuery(StrictModel):
    """How a stored response is told."""

    ignored_fields = frozenset({"include", "include[]", "include_obfuscation"})

    stream: Literal["true", "false"] = Field(
        "false", description="true: as server-sent events, each text in one piece."
    )
    starting_after: int | None = integer(
        "With stream: the sequence number of the last event that is not told again.", 0
    )


class ResponseStreamOptions(StrictModel):
    """Nothing that changes a stream."""

    place = "stream_options."
    ignored_fields = frozenset({"include_obfuscation"})


_FORM = MAX_GRAMMAR_CHARS
_MOST_CHARS = {"text": _FORM, "structured_outputs": _FORM, "tools": MAX_TOOLS_CHARS}


class ResponsesRequest(GenerationFields, TemplateVariables):
    """OpenAI's request for a response, with the fields of chats that it lacks."""

    max_quick_bytes = TemplateFields.max_quick_bytes
    max_quick_values = TemplateFields.max_quick_values
    ignored_fields = IGNORED - {
        *("metadata", "store", "parallel_tool_calls", "prediction", "verbosity"),
        "guided_decoding_backend",
    }
    refused_fields = _REFUSED
    param_defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}

    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = Field(
        None,
        description="A user's text, or items: messages, reasoning, function_call, "
        "function_call_output, custom_tool_call, custom_tool_call_output.",
        json_schema_extra={
            "anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM}, {"type": "null"}]
        },
    )
    instructions: str | None = Field(
        None, description="A system message before all else; of this response alone."
    )
    max_output_tokens: int | None = integer(
        "Tokens of the answer at most, its reasoning among them; if left out, what the context "
        "has left.",
        1,
    )
    max_tool_calls: int | None = integer("Of tools of the server, which has none.", 1)
    tools: list[dict[str, Any]] | None = Field(
        None,
        description="Functions, or custom tools with a text as input, that the model may call.",
        json_schema_extra={"anyOf": [{"type": "array", "items": _TOOL}, {"type": "null"}]},
    )
    tool_choice: str | dict[str, Any] | None = Field(
        None,
        description="auto (the model's choice), none, required (at least one call), or an object "
        "that names a tool, or the allowed ones.",
        json_schema_extra=_CHOICE,
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: an answer has one call at most."
    )
    text: TextOptions | None = Field(None, description="The form of the text.")
    reasoning: Reasoning | None = Field(None, description="How much the model reasons.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Tell log-probabilities of so many of the likeliest tokens."
    )
    include: list[Included] | None = Field(
        None,
        description="What else is told: message.output_text.logprobs, and "
        "reasoning.encrypted_content; others change nothing.",
    )
    metadata: Metadata | None = Field(
        None, description="Names and texts that the response carries."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto: of what is too long for the context the oldest items are left out. "
        "disabled, or left out: it is refused.",
    )
    previous_response_id: str | None = Field(
        None,
        max_length=64,
        description="A stored response: its input, its output and what came before them stand "
        "before the input.",
    )
    store: bool | None = Field(
        None,
        description="False: nothing is stored. True: the response is stored, or refused. If left "
        "out, it is stored where it can be.",
    )
    background: bool | None = Field(
        None,
        description="Answer at once, and go on without the client, who asks for the stored "
        "response later.",
    )
    stream_options: ResponseStreamOptions | None = Field(None, description="Changes nothing.")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The form of the text: patterns, choices, grammars."
    )
    _history: ChatHistory | None = PrivateAttr(None)
    _chat: ChatRequest | None = PrivateAttr(None)
    _tools_json: bytes = PrivateAttr(b"")
    _items_json: bytes = PrivateAttr(b"")
    _references: tuple[str, ...] | None = PrivateAttr(None)

    def field_name(self, param: str) -> str:
        """Returns the field of this body that a chat's `param` was read from."""
        if self.text is not None and self.text.format is not None:
            param = re.sub(r"^structured_outputs\b.*", "response_format", param)
        return _NAMES.get(param) or self._renamed(param)

    @property
    def includes_logprobs(self) -> bool:
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    @property
    def includes_packed_reasoning(self) -> bool:
        return _PACKED in (self.include or ())

    @property
    def tools_json(self) -> bytes:
        """The tools as they were sent."""
        return self._tools_json or msgspec.json.encode(self.tools or [])

    @property
    def items_json(self) -> bytes:
        """The input as a list of items, as they were sent."""
        if self._items_json:
            return self._items_json
        given = self.input or []
        if isinstance(given, str):
            part = {"type": "input_text", "text": given}
            given = [{"type": "message", "role": "user", "content": [part]}]
        return msgspec.json.encode(given)

    @property
    def references(self) -> tuple[str, ...]:
        """The ids of items that stand for stored ones."""
        if self._references is None:
            items = self.input if isinstance(self.input, list) else ()
            found = (reference_of(item) for item in items)
            self._references = tuple(dict.fromkeys(one for one in found if one is not None))
        return self._references

    @property
    def needs_store(self) -> bool:
        """Whether the chat is this body's and what is stored."""
        return self.previous_response_id is not None or bool(self.references)

    def check(self) -> None:
        """Reads what is here of a conversation. Raises RequestError with its places."""
        self._history = chat_history(self.input or [], None)
        try:
            read_messages(self._history.messages)
        except RequestError as error:
            raise self.renamed(error) from None

    def with_items(self, before: list[msgspec.Raw], known: Mapping[str, msgspec.Raw]) -> bytes:
        """Returns the body of the same request without anything stored: items `before` its own,
        and those of `references` in their places."""
        own = msgspec.json.decode(self.items_json, type=list[msgspec.Raw])
        if known:
            own = [known.get(response_items.raw_reference(item) or "", item) for item in own]
        return self.with_input([*before, *own])

    def with_input(self, items: list[msgspec.Raw]) -> bytes:
        """Returns the body of the same request with these items alone, and nothing stored."""
        names = {"input", "tools", "previous_response_id", "store", "background"}
        rest = self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=names)
        tools = {} if self.tools_json == b"[]" else {"tools": msgspec.Raw(self.tools_json)}
        return msgspec.json.encode({**rest, **tools, "input": items})

    @property
    def text_json(self) -> dict[str, Any]:
        """The form of the text, as responses tell it."""
        given = {} if self.text is None else self.text.model_dump(by_alias=True, exclude_none=True)
        form = given.setdefault("format", {"type": "text"})
        if form["type"] == "json_schema":
            form.setdefault("name", "answer")
        return given

    @property
    def reasoning_json(self) -> dict[str, Any]:
        """How much the model reasons, as responses tell it."""
        given = self.reasoning
        return {"effort": given and given.effort, "summary": given and given.summary}

    @property
    def chat(self) -> ChatRequest:
        """The chat that this body comes to. Raises RequestError."""
        if self._chat is None:
            self._chat = ChatRequest.model_validate(self._chat_values())
        return self._chat

    def check_size(self) -> None:
        for name, most in _MOST_CHARS.items():
            value = getattr(self, name)
            check_chars(value.model_dump() if isinstance(value, BaseModel) else value, name, most)

    def with_rendered(self, renderer: ChatRenderer) -> Self:
        """Returns a copy that has the text of the chat, if all of it is here, and few objects."""
        chat = None
        if self.needs_store:
            self.check()
        else:
            try:
                chat = self.chat.with_rendered(renderer)
            except RequestError as error:
                raise self.renamed(error) from None
        copy = self.model_copy(update={"input": None, "tools": None})
        copy._chat, copy._tools_json = chat, self.tools_json
        copy._items_json, copy._references = self.items_json, self.references
        return copy

    def renamed(self, error: RequestError) -> RequestError:
        """Returns an error of the chat with the names and places of this body."""
        error.args = (self._renamed(str(error)),)
        error.param = None if error.param is None else self.field_name(error.param)
        return error

    def _renamed(self, text: str) -> str:
        if self._history is not None:
            text = self._history.renamed(text)
        return re.sub(r"(\btools\[\d+\])\.(?:function|custom)\b", r"\1", text)

    def _chat_values(self) -> dict[str, Any]:
        self._history = history = chat_history(self.input or [], self.instructions)
        if not history.messages or not self.input:
            raise RequestError("input is missing or empty", param="input", code="missing_field")
        effort = None if self.reasoning is None else self.reasoning.effort
        form = None if self.text is None else self.text.format
        same = (
            *("tool_choice", "parallel_tool_calls", "enable_thinking", "chat_template_kwargs"),
            "structured_outputs",
        )
        values = {name: getattr(self, name) for name in same if name in self.model_fields_set}
        return {
            **self.given_values(),
            **values,
            "messages": history.messages,
            "max_tokens": self.max_output_tokens,
            "tools": None
            if self.tools is None
            else [response_items.chat_tool(one) for one in self.tools],
            "reasoning_effort": effort,
            "response_format": None if form is None else form.as_response_format(),
            "logprobs": self.includes_logprobs,
            "top_logprobs": self.top_logprobs,
        }
