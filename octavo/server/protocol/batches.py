"""What clients send to /v1/batches: the body that makes a batch, and each line of its file.

Parsed for `routes.batches` and `batches.lines`; never touches the store.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from octavo.errors import RequestError, shown
from octavo.server.protocol.files import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from octavo.server.protocol.strict import StrictModel

ENDPOINTS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
    *("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank", "/pooling"),
)
MAX_WINDOW_SECONDS = 30 * 86400
MAX_METADATA = 16
_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86400}

MetadataName = Annotated[str, Field(max_length=64)]
MetadataText = Annotated[str, Field(max_length=512)]


class OutputExpiry(StrictModel):
    """When the files of a batch are removed."""

    place = "output_expires_after."

    anchor: Literal["created_at"] = Field(description="From when seconds count: created_at.")
    seconds: int = Field(description="Seconds.", ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)


class BatchRequest(StrictModel):
    """A new batch."""

    input_file_id: str = Field(description="A file of requests, uploaded with purpose batch.")
    endpoint: str = Field(description="The route that all lines are for.")
    completion_window: str = Field(
        "24h",
        description="How long it may take, like 24h, 90m or 7d; 30 days at most.",
        pattern=r"^[0-9]{1,5}[mhd]$",
    )
    metadata: dict[MetadataName, MetadataText] | None = Field(
        None, description="Up to 16 texts by name, kept with it.", max_length=MAX_METADATA
    )
    output_expires_after: OutputExpiry | None = Field(
        None, description="Remove its files after a time; never if left out."
    )

    def window_seconds(self) -> int:
        """Returns the completion window. Raises RequestError."""
        found = re.fullmatch(r"([0-9]{1,5})([mhd])", self.completion_window)
        seconds = int(found[1]) * _UNIT_SECONDS[found[2]] if found else 0
        if not 0 < seconds <= MAX_WINDOW_SECONDS:
            message = f"completion_window must be 1m to 30d, got {shown(self.completion_window)}"
            raise RequestError(message, param="completion_window", code="invalid_value")
        return seconds


class BatchLine(StrictModel):
    """One line of a batch's file."""

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]
