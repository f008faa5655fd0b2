"""The body of POST /invocations: a chat's or a completion's.

Parsed for `routes.sagemaker`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.server.protocol.chat import ChatRequest
from octavo.server.protocol.completions import CompletionRequest
from octavo.server.protocol.strict import RequestModel, StrictModel


class InvocationRequest(RequestModel):
    """With `messages` a chat, else a completion."""

    max_quick_bytes = ChatRequest.max_quick_bytes
    max_quick_values = ChatRequest.max_quick_values

    @classmethod
    def variant(cls, data: Mapping[str, Any]) -> type[StrictModel]:
        return ChatRequest if "messages" in data else CompletionRequest

    @classmethod
    def variants(cls) -> tuple[type[StrictModel], ...]:
        return (ChatRequest, CompletionRequest)
