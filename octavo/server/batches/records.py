"""Batches in the store: their objects, who works on which, and what became of each line.

Every function runs within a transaction (`Store.run`), so that what it changes is whole. Called by
the routes, and by the workers, which lose a batch (LostError) if another process has taken it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable
from typing import Any

import msgspec

from octavo.errors import OctavoError, RequestError, shown
from octavo.server.errors import ApiError
from octavo.server.store import files, objects
from octavo.server.store.bounds import Amount, Bounds, Kind
from octavo.server.store.files import StoredFile
from octavo.server.store.objects import Name
from octavo.server.store.owners import Owner

VALIDATING, IN_PROGRESS, FINALIZING = "validating", "in_progress", "finalizing"
CANCELLING = "cancelling"
ENDS = frozenset({"completed", "failed", "expired", "cancelled"})


class LostError(OctavoError):
    """Another process works on the batch now."""


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch as a whole failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch, as it is stored. Times are Unix seconds."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    model: str
    metadata: dict[str, str] | None = None
    output_expiry_seconds: int | None = None
    status: str = VALIDATING
    errors: list[BatchError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def answer(self) -> dict[str, Any]:
        """Returns OpenAI's batch object."""
        told = {"object": "batch", **msgspec.to_builtins(self)}
        del told["output_expiry_seconds"]
        counts = {name: told.pop(name) for name in ("total", "completed", "failed")}
        errors = {"object": "list", "data": told["errors"]} if self.errors else None
        return {**told, "errors": errors, "request_counts": counts}


def _name(tenant: str, id: str) -> Name:
    return Name(kind=Kind.BATCH, tenant=tenant, id=id)


def _decoded(body: bytes) -> Batch:
    return msgspec.json.decode(body, type=Batch)


def create(db: sqlite3.Connection, bounds: Bounds, tenant: str, batch: Batch) -> None:
    """Stores a new batch. Raises RequestError, ApiError (404, 507)."""
    now = batch.created_at
    file_name = Name(kind=Kind.FILE, tenant=tenant, id=batch.input_file_id)
    body = objects.get(db, file_name, now)
    if body is None:
        message = f"there is no file {shown(batch.input_file_id)}; upload it to /v1/files first"
        raise ApiError(404, message, code="file_not_found", param="input_file_id")
    purpose = files.decode(body).purpose
    if purpose != "batch":
        message = f"input_file_id must be a file with purpose batch, got one with {purpose}"
        raise RequestError(message, param="input_file_id", code="invalid_value")
    objects.put(db, bounds, _name(tenant, batch.id), msgspec.json.encode(batch), now)
    db.execute(
        "INSERT INTO open_batches (id, tenant, model, input_file_id, expires_at)"
        " VALUES (?, ?, ?, ?, ?)",
        (batch.id, tenant, batch.model, batch.input_file_id, batch.expires_at),
    )


def read(db: sqlite3.Connection, tenant: str, id: str, now: float) -> Batch | None:
    """Returns a batch with the numbers of this moment."""
    body = objects.get(db, _name(tenant, id), now)
    return None if body is None else counted(db, [body])[0]


def counted(db: sqlite3.Connection, bodies: Iterable[bytes]) -> list[Batch]:
    """Returns batches of their bodies, with the numbers of this moment."""
    found = []
    query = "SELECT num_completed, num_failed FROM open_batches WHERE id = ?"
    for batch in map(_decoded, bodies):
        row = db.execute(query, (batch.id,)).fetchone()
        if row is not None:
            batch = msgspec.structs.replace(batch, completed=row[0], failed=row[1])
        found.append(batch)
    return found


def change(db: sqlite3.Connection, tenant: str, id: str, now: float, **fields: Any) -> Batch:
    """Changes fields of a batch, and returns it."""
    batch = read(db, tenant, id, now)
    if batch is None:
        raise LostError(f"batch {id} is gone")
    batch = msgspec.structs.replace(batch, **fields)
    objects.update(db, _name(tenant, id), lambda _: msgspec.json.encode(batch), now)
    return batch


def cancel(db: sqlite3.Connection, tenant: str, id: str, now: float) -> Batch | None:
    """Begins the end of a batch; None if there is none. Raises ApiError (409) if it is over, or
    about to be."""
    batch = read(db, tenant, id, now)
    if batch is None or batch.status == CANCELLING:
        return batch
    if batch.status not in (VALIDATING, IN_PROGRESS):
        message = f"batch {id} is {batch.status}; only one that runs can be cancelled"
        raise ApiError(409, message, code="batch_not_running", param="batch_id")
    db.execute("UPDATE open_batches SET is_cancelling = 1 WHERE id = ?", (id,))
    return change(db, tenant, id, now, status=CANCELLING, cancelling_at=int(now))


# -- workers -------------------------------------------------------------------------------------


def claim(
    db: sqlite3.Connection,
    owner: Owner,
    knows: Callable[[str], bool],
    models: Collection[str],
    now: float,
    limit: int,
) -> list[tuple[str, str]]:
    """Takes batches that nobody works on, at most `limit`; returns tenant and id of each.

    Those of tenants and models that this server knows, those of a tenant with fewest running ones
    first; and whatever has expired.
    """
    rows = db.execute(
        "SELECT id, tenant, model, owner, expires_at FROM open_batches ORDER BY rowid"
    ).fetchall()
    alive = {name: owner.is_alive(name) for name in {row[3] for row in rows} - {None}}
    running: dict[str, int] = {}
    free: list[tuple[str, str]] = []
    for id, tenant, model, held_by, expires_at in rows:
        if held_by is not None and alive[held_by]:
            running[tenant] = running.get(tenant, 0) + 1
        elif (knows(tenant) and model in models) or expires_at <= now:
            free.append((tenant, id))
    taken = []
    while free and len(taken) < limit:
        tenant, id = min(free, key=lambda one: running.get(one[0], 0))
        free.remove((tenant, id))
        running[tenant] = running.get(tenant, 0) + 1
        db.execute("UPDATE open_batches SET owner = ? WHERE id = ?", (owner.name, id))
        taken.append((tenant, id))
    return taken


def release(db: sqlite3.Connection, owner: Owner, id: str | None = None) -> None:
    """Gives back one batch, or all that `owner` works on."""
    one = "" if id is None else " AND id = :id"
    query = f"UPDATE open_batches SET owner = NULL WHERE owner = :owner{one}"
    db.execute(query, {"owner": owner.name, "id": id})


def to_stop(db: sqlite3.Connection, owner: Owner, now: float) -> set[str]:
    """Returns the ids of those of `owner` that are to end before all lines are done."""
    query = "SELECT id FROM open_batches WHERE owner = ? AND (is_cancelling OR expires_at <= ?)"
    return {row[0] for row in db.execute(query, (owner.name, now))}


def check_owner(db: sqlite3.Connection, owner: Owner, id: str) -> None:
    """Raises LostError unless `owner` works on the batch."""
    row = db.execute("SELECT owner FROM open_batches WHERE id = ?", (id,)).fetchone()
    if row is None or row[0] != owner.name:
        raise LostError(f"batch {id} is another process's now")


def num_open(db: sqlite3.Connection) -> int:
    """Returns how many batches are not over."""
    return db.execute("SELECT COUNT(*) FROM open_batches").fetchone()[0]


def lines_done(db: sqlite3.Connection, id: str) -> set[int]:
    """Returns the numbers of the lines that have a result."""
    return {row[0] for row in db.execute("SELECT line FROM batch_lines WHERE batch = ?", (id,))}


class LineResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a line: a line of the file of results, or of the file of errors."""

    line: int
    is_error: bool
    body: bytes


def record(
    db: sqlite3.Connection,
    bounds: Bounds,
    owner: Owner,
    tenant: str,
    id: str,
    results: Collection[LineResult],
) -> None:
    """Keeps the results of lines, the first of each. Raises LostError, ApiError (507)."""
    check_owner(db, owner, id)
    more = Amount(0, sum(len(result.body) for result in results))
    objects.make_room(db, bounds, Kind.BATCH.pool, tenant, more)
    counts = [0, 0]
    for result in results:
        added = db.execute(
            "INSERT OR IGNORE INTO batch_lines VALUES (?, ?, ?, ?, ?)",
            (id, result.line, tenant, result.is_error, result.body),
        ).rowcount
        counts[result.is_error] += added
    db.execute(
        "UPDATE open_batches SET num_completed = num_completed + ?, num_failed = num_failed + ?"
        " WHERE id = ?",
        (*counts, id),
    )


def results_after(db: sqlite3.Connection, id: str, line: int, limit: int) -> list[LineResult]:
    """Returns results in the order of lines, those behind `line`."""
    query = (
        "SELECT line, is_error, body FROM batch_lines WHERE batch = ? AND line > ?"
        " ORDER BY line LIMIT ?"
    )
    rows = db.execute(query, (id, line, limit)).fetchall()
    return [LineResult(line=row[0], is_error=bool(row[1]), body=row[2]) for row in rows]


def end(
    db: sqlite3.Connection,
    owner: Owner,
    tenant: str,
    id: str,
    now: float,
    outputs: Collection[StoredFile],
    **fields: Any,
) -> Batch:
    """Ends a batch: its files are there, its lines' results are not kept besides. Raises
    LostError."""
    check_owner(db, owner, id)
    batch = change(db, tenant, id, now, **fields)
    num_lines = batch.completed + batch.failed
    if batch.total < num_lines:  # It has ended before all lines were counted.
        batch = change(db, tenant, id, now, total=num_lines)
    db.execute("DELETE FROM batch_lines WHERE batch = ?", (id,))
    for file in outputs:
        files.put(db, None, tenant, file)  # Room was made for all that is in it.
    db.execute("DELETE FROM open_batches WHERE id = ?", (id,))
    return batch
