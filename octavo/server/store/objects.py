"""Stored objects within a transaction: for `Store`, and for those that change several at once.

Every function takes the connection that `Database.run` hands to its work. Never commits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from octavo.server.errors import ApiError
from octavo.server.store.bounds import Amount, Bounds, Kind, Pool

Change = Callable[[bytes], bytes | None]
"""Makes a new body of the old one; None leaves it as it is."""

_IS_HERE = "(expires_at IS NULL OR expires_at > :now)"
_IS_MEANT = f"tenant = :tenant AND kind = :kind AND id = :id AND {_IS_HERE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """Which object: an id is one tenant's."""

    kind: Kind
    tenant: str
    id: str

    def at(self, now: float) -> dict[str, object]:
        return {"kind": self.kind, "tenant": self.tenant, "id": self.id, "now": now}


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list: ids with bodies."""

    objects: list[tuple[str, bytes]]
    has_more: bool


def put(
    db: sqlite3.Connection,
    bounds: Bounds,
    name: Name,
    body: bytes,
    now: float,
    *,
    expires_at: int | None = None,
    extra_bytes: int = 0,
) -> None:
    """Stores an object in place of one of the same name, if there is one.

    Raises ApiError (507) if it does not fit, not even once all is removed that makes room.
    """
    clear(db, name)
    make_room(db, bounds, name.kind.pool, name.tenant, Amount(1, len(body) + extra_bytes))
    add(db, name, body, now, expires_at=expires_at, extra_bytes=extra_bytes)


def clear(db: sqlite3.Connection, name: Name) -> None:
    """Removes the object of this name, if there is one."""
    query = "DELETE FROM objects WHERE tenant = :tenant AND kind = :kind AND id = :id"
    db.execute(query, name.at(0))


def add(
    db: sqlite3.Connection,
    name: Name,
    body: bytes,
    now: float,
    *,
    expires_at: int | None = None,
    extra_bytes: int = 0,
) -> None:
    """Stores a new object, whose room has been made; `extra_bytes` belong to it besides."""
    db.execute(
        "INSERT INTO objects (pool, kind, tenant, id, created_at, expires_at, extra_bytes, body)"
        " VALUES (:pool, :kind, :tenant, :id, :created_at, :expires_at, :extra_bytes, :body)",
        name.at(now)
        | {
            "pool": name.kind.pool,
            "created_at": int(now),
            "expires_at": expires_at,
            "extra_bytes": extra_bytes,
            "body": body,
        },
    )


def get(db: sqlite3.Connection, name: Name, now: float) -> bytes | None:
    """Returns the body of an object, or None."""
    row = db.execute(f"SELECT body FROM objects WHERE {_IS_MEANT}", name.at(now)).fetchone()
    return None if row is None else row[0]


def update(db: sqlite3.Connection, name: Name, change: Change, now: float) -> bytes | None:
    """Returns the body of an object as `change` made it, or None if there is none."""
    body = get(db, name, now)
    if body is None:
        return None
    changed = change(body)
    if changed is None:
        return body
    row = name.at(now) | {"body": changed}
    db.execute(f"UPDATE objects SET body = :body WHERE {_IS_MEANT}", row)
    return changed


def renew(db: sqlite3.Connection, name: Name) -> None:
    """Makes an object the newest one: the last that makes room."""
    query = "UPDATE objects SET seq = (SELECT max(seq) + 1 FROM objects)"
    where = "WHERE tenant = :tenant AND kind = :kind AND id = :id"
    db.execute(f"{query} {where}", name.at(0))


def delete(db: sqlite3.Connection, name: Name, now: float) -> bool:
    """Returns whether there was such an object."""
    return db.execute(f"DELETE FROM objects WHERE {_IS_MEANT}", name.at(now)).rowcount > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a list."""

    limit: int
    after: str | None = None
    """Begins behind the object of this id."""
    newest_first: bool = True
    field: tuple[str, str] | None = None
    """Only bodies, as JSON, in which this field has this value."""


def page(db: sqlite3.Connection, kind: Kind, tenant: str, now: float, part: Part) -> Page | None:
    """Returns part of a tenant's objects; None if the one that it begins behind is not there."""
    order, sign = ("DESC", "<") if part.newest_first else ("ASC", ">")
    row = {"kind": kind, "tenant": tenant, "id": part.after, "now": now, "limit": part.limit + 1}
    conditions = f"tenant = :tenant AND kind = :kind AND {_IS_HERE}"
    if part.after is not None:
        found = db.execute(f"SELECT seq FROM objects WHERE {_IS_MEANT}", row).fetchone()
        if found is None:
            return None
        row["seq"] = found[0]
        conditions += f" AND seq {sign} :seq"
    if part.field is not None:
        row["field"], row["value"] = f"$.{part.field[0]}", part.field[1]
        conditions += " AND json_extract(CAST(body AS TEXT), :field) = :value"
    query = f"SELECT id, body FROM objects WHERE {conditions} ORDER BY seq {order} LIMIT :limit"
    found = db.execute(query, row).fetchall()
    return Page(found[: part.limit], len(found) > part.limit)


def remove_expired(db: sqlite3.Connection, now: float) -> list[str]:
    """Removes what has expired; returns the ids of files among it, whose contents are left."""
    query = "DELETE FROM objects WHERE expires_at <= ? RETURNING kind, id"
    return [id for kind, id in db.execute(query, (now,)).fetchall() if kind == Kind.FILE]


def make_room(
    db: sqlite3.Connection, bounds: Bounds, pool: Pool, tenant: str, more: Amount
) -> None:
    """Lets `more` fit. Removes the oldest of a pool that passes: the tenant's own while it has too
    much, then those of whoever has most. Raises ApiError (507)."""
    limit, total = bounds.of_tenant(pool), bounds.total(pool)
    if not more.fits(limit):
        raise _no_room(pool, more, limit)
    while not (own := used(db, pool, tenant) + more).fits(limit):
        if pool is Pool.KEPT:
            raise _no_room(pool, own, limit)
        _remove_oldest(db, pool, tenant)
    while not (all_of := used(db, pool) + more).fits(total):
        if pool is Pool.KEPT:
            raise _no_room(pool, all_of, total)
        query = "SELECT tenant FROM usage WHERE pool = ? ORDER BY num_bytes DESC LIMIT 1"
        [largest] = db.execute(query, (pool,)).fetchone()
        _remove_oldest(db, pool, largest)


def used(db: sqlite3.Connection, pool: Pool, tenant: str | None = None) -> Amount:
    """Returns what a tenant, or all, have stored."""
    query = "SELECT total(count), total(num_bytes) FROM usage WHERE pool = ?"
    if tenant is None:
        row = db.execute(query, (pool,)).fetchone()
    else:
        row = db.execute(query + " AND tenant = ?", (pool, tenant)).fetchone()
    return Amount(int(row[0]), int(row[1]))


def _remove_oldest(db: sqlite3.Connection, pool: Pool, tenant: str) -> None:
    oldest = "SELECT min(seq) FROM objects WHERE pool = ? AND tenant = ?"
    db.execute(f"DELETE FROM objects WHERE seq = ({oldest})", (pool, tenant))


def _no_room(pool: Pool, wanted: Amount, limit: Amount) -> ApiError:
    what = "responses" if pool is Pool.PASSING else "files and batches"
    message = (
        f"the store has no room: {what} would have {wanted.count} objects of {wanted.num_bytes} "
        f"bytes, the limit is {limit.count} objects and {limit.num_bytes} bytes; delete what is "
        "not needed, or start the server with a larger --max-store-bytes"
    )
    return ApiError(507, message, code="store_full")
