"""The store of one server: objects of clients, each a tenant's, by kind and id.

Made with the app; the routes of responses, files and batches call it. All front processes of a
server share its folder, and so may servers of one host and one user: they see the same objects.
Never looks into a body.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from octavo.config import ServerConfig, store_dir
from octavo.errors import OctavoError
from octavo.server.errors import ApiError
from octavo.server.store import objects
from octavo.server.store.bounds import Bounds, Kind
from octavo.server.store.contents import Contents
from octavo.server.store.database import Database, T, Work
from octavo.server.store.objects import Change, Name, Page, Part

logger = logging.getLogger(__name__)


class Store:
    """Objects that outlive the server. Its file is opened by the first call.

    All calls raise ApiError, 503 if the store cannot be used and 507 if it is full, and
    OverloadedError.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells Unix seconds."""
        num_tenants = len(config.api_key) + len(config.operator_key) + 2 * bool(config.keys)
        self.bounds = Bounds(config.max_store_bytes, num_tenants)
        self.folder = Path(config.store_dir or store_dir())
        self.clock = clock
        self.contents = Contents(self.folder)
        self._database = Database(self.folder)

    async def check(self) -> None:
        """Opens the store; logs a warning if it cannot be used, which only those are told of
        again that need it."""
        if not self.bounds.max_bytes:
            return
        try:
            await self.run(lambda db: None)
        except OctavoError as error:
            logger.warning("responses, files and batches cannot be stored: %s", error)

    async def close(self) -> None:
        await self._database.close()

    async def run(self, work: Work[T]) -> T:
        """Returns what `work` returns, which may call `objects` with the connection it gets: in
        another thread, within one transaction."""
        if not self.bounds.max_bytes:
            message = "this server stores nothing; start it with --max-store-bytes above 0"
            raise ApiError(503, message, code="store_unavailable")
        return await self._database.run(work)

    async def put(
        self, kind: Kind, tenant: str, id: str, body: bytes, *, expires_at: int | None = None
    ) -> None:
        """Stores an object, until `expires_at` (Unix seconds), in place of one of the same name if
        there is one. Oldest responses make room for new ones; all else is refused (507)."""
        name, now = Name(kind=kind, tenant=tenant, id=id), self.clock()
        await self.run(
            lambda db: objects.put(db, self.bounds, name, body, now, expires_at=expires_at)
        )

    async def get(self, kind: Kind, tenant: str, id: str) -> bytes | None:
        """Returns the body of an object, or None: there is none, or it is another tenant's."""
        name, now = Name(kind=kind, tenant=tenant, id=id), self.clock()
        return await self.run(lambda db: objects.get(db, name, now))

    async def update(self, kind: Kind, tenant: str, id: str, change: Change) -> bytes | None:
        """Returns the body of an object as `change` made it of the old one, in one piece: no other
        change falls in between. None if there is no such object."""
        name, now = Name(kind=kind, tenant=tenant, id=id), self.clock()
        return await self.run(lambda db: objects.update(db, name, change, now))

    async def delete(self, kind: Kind, tenant: str, id: str) -> bool:
        """Returns whether there was such an object."""
        name, now = Name(kind=kind, tenant=tenant, id=id), self.clock()
        return await self.run(lambda db: objects.delete(db, name, now))

    async def list(self, kind: Kind, tenant: str, part: Part) -> Page | None:
        """Returns part of a tenant's objects; None if the one that it begins behind is not
        there."""
        now = self.clock()
        return await self.run(lambda db: objects.page(db, kind, tenant, now, part))
