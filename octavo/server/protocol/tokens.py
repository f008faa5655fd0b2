"""The bodies of POST /tokenize and POST /detokenize.

Parsed for `routes.tokens`; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from octavo.server.protocol.chat import TemplateFields
from octavo.server.protocol.strict import (
    PackedIds,
    RequestModel,
    StrictModel,
    TokenId,
    packed_ids,
)


class TokenizeRequest(RequestModel):
    """What both kinds of POST /tokenize have; a body with `messages` is a chat."""

    max_quick_bytes = TemplateFields.max_quick_bytes
    max_quick_values = TemplateFields.max_quick_values

    return_token_strs: bool = Field(
        False, description="Tell how the vocabulary spells each token, too."
    )

    @classmethod
    def variant(cls, data: Mapping[str, Any]) -> type[TokenizeRequest]:
        return TokenizeChatRequest if "messages" in data else TokenizeTextRequest

    @classmethod
    def variants(cls) -> tuple[type[StrictModel], ...]:
        return (TokenizeTextRequest, TokenizeChatRequest)


class TokenizeTextRequest(TokenizeRequest):
    """Plain text to token ids."""

    prompt: str = Field(description="A text.")
    add_special_tokens: bool = Field(
        True, description="Put before the text what the model wants before texts."
    )


class TokenizeChatRequest(TokenizeRequest, TemplateFields):
    """Messages to the token ids that a chat completion would start from."""


class DetokenizeRequest(RequestModel):
    """Token ids to text."""

    max_quick_values = 32 * 1024

    tokens: Annotated[
        PackedIds,
        PlainValidator(
            lambda ids: packed_ids(ids, "tokens", "tokens"), json_schema_input_type=list[TokenId]
        ),
    ] = Field(description="Token ids.")
