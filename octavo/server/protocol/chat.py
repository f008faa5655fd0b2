"""The body of POST /v1/chat/completions, and the messages as a chat template wants them.

Parsed by FastAPI for `routes.chat` and `routes.tokens`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from octavo.errors import RequestError
from octavo.request import SamplingParams
from octavo.server.protocol.sampling import (
    IGNORED,
    REFUSED,
    RequestModel,
    SamplingFields,
    is_unicode,
)

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_FIELDS = {"role", "content", "name"}
_EMPTY_FIELDS = {"refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"}
"""Fields that answers of the API carry; they may be sent back as long as they hold nothing."""

Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


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
        return [_as_text(m, f"messages[{i}]") for i, m in enumerate(self.messages)]

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
    max_completion_tokens: int | None = None

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


def _as_text(message: dict[str, Any], where: str) -> dict[str, str]:
    for name, value in message.items():
        if name in _EMPTY_FIELDS and value not in (None, [], ""):
            reason = f"{where}.{name} is not supported: tools and audio are not"
            raise RequestError(reason, param=f"{where}.{name}", code="unsupported_field")
        if name not in _MESSAGE_FIELDS | _EMPTY_FIELDS:
            reason = f"{where}.{name} is an unknown field; use role, content, name"
            raise RequestError(reason, param=f"{where}.{name}", code="unknown_field")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        reason = f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}"
        raise RequestError(reason, param=f"{where}.role")
    result = {"role": ROLES[role], "content": _content(message, f"{where}.content", role)}
    name = message.get("name")
    if name is not None:
        result["name"] = _checked_text(name, f"{where}.name", "a string")
    return result


def _content(message: dict[str, Any], where: str, role: str) -> str:
    content = message.get("content")
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        return _checked_text(content, where, "a string or a list of text parts")
    return "".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text":
        reason = f"{where}: a content part of type {kind!r} is not supported; only 'text' is"
        raise RequestError(reason, param=where, code="unsupported_content_part")
    return _checked_text(part.get("text"), f"{where}.text", "a string")


def _checked_text(value: object, where: str, wanted: str) -> str:
    if not isinstance(value, str) or not is_unicode(value):
        raise RequestError(f"{where} must be {wanted} of valid Unicode", param=where)
    return value
