"""The bodies of POST /tokenize and POST /detokenize.

Parsed by FastAPI for `routes.tokens`; never touches the engine.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from octavo.server.protocol.chat import TemplateFields
from octavo.server.protocol.sampling import RequestModel, Text, TokenId


class TokenizeTextRequest(RequestModel):
    """Plain text to token ids."""

    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(TemplateFields):
    """Messages to the token ids that a chat completion would start from."""

    return_token_strs: bool | None = False


def _kind(body: object) -> str:
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("text")] | Annotated[TokenizeChatRequest, Tag("chat")],
    Discriminator(_kind),
]


class DetokenizeRequest(RequestModel):
    """Token ids to text."""

    tokens: list[TokenId]
