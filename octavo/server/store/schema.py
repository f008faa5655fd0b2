"""The tables of a store, made once, and the numbers that triggers keep of them.

Used by `database` when it opens a file. Never reads an object.
"""

from __future__ import annotations

import sqlite3

from octavo.server.errors import ApiError

VERSION = 1
"""Of the tables, in the file's `user_version`."""

_TABLES = """
CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which they came, for lists
    pool TEXT NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at INTEGER NOT NULL,            -- Unix seconds
    expires_at INTEGER,                     -- gone from then on
    extra_bytes INTEGER NOT NULL,           -- what belongs to it beside the body: a file's content
    body BLOB NOT NULL,
    UNIQUE (tenant, kind, id)
);
CREATE INDEX IF NOT EXISTS objects_of_tenant ON objects (tenant, kind, seq);
CREATE INDEX IF NOT EXISTS objects_of_pool ON objects (pool, tenant, seq);
CREATE INDEX IF NOT EXISTS objects_that_expire ON objects (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS batch_lines (  -- what became of lines of open batches
    batch TEXT NOT NULL,
    line INTEGER NOT NULL,                  -- from 1 on
    tenant TEXT NOT NULL,
    is_error INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS open_batches (  -- in the order in which they came
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,                    -- the served name that it was left for
    input_file_id TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    owner TEXT,                             -- the process that works on it
    is_cancelling INTEGER NOT NULL DEFAULT 0,
    num_completed INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE IF NOT EXISTS usage (
    pool TEXT NOT NULL,
    tenant TEXT NOT NULL,
    count INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    PRIMARY KEY (pool, tenant)
) WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS objects_come AFTER INSERT ON objects BEGIN
    INSERT INTO usage VALUES (new.pool, new.tenant, 1, length(new.body) + new.extra_bytes)
    ON CONFLICT DO UPDATE SET count = count + 1, num_bytes = num_bytes + excluded.num_bytes;
END;
CREATE TRIGGER IF NOT EXISTS objects_change AFTER UPDATE OF body, extra_bytes ON objects BEGIN
    UPDATE usage SET num_bytes = num_bytes + length(new.body) + new.extra_bytes
        - length(old.body) - old.extra_bytes
    WHERE pool = new.pool AND tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS objects_go AFTER DELETE ON objects BEGIN
    UPDATE usage SET count = count - 1, num_bytes = num_bytes - length(old.body) - old.extra_bytes
    WHERE pool = old.pool AND tenant = old.tenant;
END;
CREATE TRIGGER IF NOT EXISTS batch_lines_come AFTER INSERT ON batch_lines BEGIN
    UPDATE usage SET num_bytes = num_bytes + length(new.body)
    WHERE pool = 'kept' AND tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS batch_lines_go AFTER DELETE ON batch_lines BEGIN
    UPDATE usage SET num_bytes = num_bytes - length(old.body)
    WHERE pool = 'kept' AND tenant = old.tenant;
END;
"""


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables where there are none. Raises ApiError for those of a later version; to be
    called by one process at a time."""
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        message = (
            f"the store was written by a later version of Octavo (tables {version}, known "
            f"{VERSION}); start the server with another --store-dir"
        )
        raise ApiError(503, message, code="store_unavailable")
    if version == VERSION:
        return  # Others write already, and are not to be waited for.
    if version == 0:
        # Before the first table: pages that are free can then be given back.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
    # Immediate: a transaction that reads first cannot wait for a writer afterwards.
    connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
