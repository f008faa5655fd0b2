"""Files as objects of the store: what is told of one, and its content's bytes in its tenant's room.

Used by the routes of files and by batches. Contents themselves are `contents`'.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

import msgspec

from octavo.server.errors import ApiError
from octavo.server.store import objects
from octavo.server.store.bounds import Bounds, Kind
from octavo.server.store.objects import Name


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None
    """Unix seconds; None: never."""

    def answer(self) -> dict[str, Any]:
        """Returns OpenAI's file object."""
        told = {"object": "file", "status": "processed", **msgspec.structs.asdict(self)}
        if self.expires_at is None:
            del told["expires_at"]
        return told


def decode(body: bytes) -> StoredFile:
    return msgspec.json.decode(body, type=StoredFile)


def put(db: sqlite3.Connection, bounds: Bounds | None, tenant: str, file: StoredFile) -> None:
    """Stores a file whose content is in its place. Raises ApiError (507) if it is beyond
    `bounds`."""
    name = Name(kind=Kind.FILE, tenant=tenant, id=file.id)
    body = msgspec.json.encode(file)
    settings = {"expires_at": file.expires_at, "extra_bytes": file.bytes}
    if bounds is None:
        objects.clear(db, name)
        objects.add(db, name, body, file.created_at, **settings)
    else:
        objects.put(db, bounds, name, body, file.created_at, **settings)


def delete(db: sqlite3.Connection, name: Name, now: float) -> bool:
    """Removes a file, whose content is left; returns whether there was one. Raises ApiError (409)
    while a batch reads it."""
    query = "SELECT id FROM open_batches WHERE tenant = ? AND input_file_id = ?"
    reader = db.execute(query, (name.tenant, name.id)).fetchone()
    if reader is not None:
        message = f"batch {reader[0]} reads this file; cancel the batch first, or wait for its end"
        raise ApiError(409, message, code="file_in_use", param="file_id")
    return objects.delete(db, name, now)


def known(db: sqlite3.Connection, ids: Iterable[str]) -> set[str]:
    """Returns those of `ids` that are a file's, whoever's it is."""
    query = "SELECT id FROM objects WHERE kind = ?"
    return {row[0] for row in db.execute(query, (Kind.FILE,))}.intersection(ids)
