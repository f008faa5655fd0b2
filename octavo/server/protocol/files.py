"""What clients send to /v1/files: the fields of an upload, the part of a list.

Parsed for `routes.files`; never touches the store.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from octavo.server.protocol.strict import StrictModel

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 2_592_000
MAX_LISTED_FILES = 10_000
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


class UploadFields(StrictModel):
    """An upload's fields beside its file."""

    aliases = frozenset({ANCHOR, SECONDS})

    purpose: Literal["batch"] = Field(description="What the file is for: batch.")
    expires_after_anchor: Literal["created_at"] | None = Field(
        None, alias=ANCHOR, description="From when expires_after[seconds] count: created_at."
    )
    expires_after_seconds: int | None = Field(
        None,
        alias=SECONDS,
        description="Remove the file after so many seconds.",
        ge=MIN_EXPIRY_SECONDS,
        le=MAX_EXPIRY_SECONDS,
    )


class ListQuery(StrictModel):
    """Which part of a list."""

    limit: int = Field(20, description="Objects at most.", ge=1, le=100)
    after: str | None = Field(None, description="Begin behind the object of this id.")


class FilesQuery(ListQuery):
    """Which files."""

    limit: int = Field(MAX_LISTED_FILES, description="Files at most.", ge=1, le=MAX_LISTED_FILES)
    order: Literal["asc", "desc"] = Field("desc", description="By age: oldest or newest first.")
    purpose: str | None = Field(None, description="Only files of this purpose.")
