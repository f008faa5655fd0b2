"""Responses in the store: what is kept of one, the conversation behind it, and the end from afar.

Called by the routes of responses; all front processes of a server share what they find here. Never
generates anything.

A response is stored when it begins and again when it ends. Whoever cancels one leaves a mark, which
the front process that makes it finds within LOOK_SECONDS; that process renews a mark of its own
meanwhile, so that others know whether it still lives.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import msgspec

from octavo.errors import OctavoError, RequestError, shown
from octavo.server.errors import ApiError
from octavo.server.protocol.response_items import is_response_id, response_of_item
from octavo.server.store import objects
from octavo.server.store.bounds import Kind
from octavo.server.store.objects import Name
from octavo.server.store.store import Store

LOOK_SECONDS = 0.3
ALIVE_SECONDS = 15
"""A front process whose mark is older has ended."""
MARK_SECONDS = 3600
MAX_TURNS = 1024
"""Responses behind one another."""
IN_PROGRESS, CANCELLED, FAILED = "in_progress", "cancelled", "failed"

Stop = Callable[[], None]


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One response, and what it was asked with."""

    status: str
    owner: str
    """The front process that makes it."""
    previous_id: str | None
    items: msgspec.Raw
    """The input items of this response alone."""
    response: msgspec.Raw

    def input(self) -> list[msgspec.Raw]:
        """Returns the input items."""
        return msgspec.json.decode(self.items, type=list[msgspec.Raw])

    def output(self) -> list[msgspec.Raw]:
        """Returns the output items."""
        return msgspec.json.decode(self.response, type=_Output).output

    def ended(self, status: str, message: str | None) -> StoredResponse:
        """Returns the same with another status, and an error where there is a message."""
        response = msgspec.json.decode(self.response)
        error = None if message is None else {"code": "server_error", "message": message}
        response |= {"status": status, "error": error}
        told = msgspec.Raw(msgspec.json.encode(response))
        return msgspec.structs.replace(self, status=status, response=told)


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


def name_of(tenant: str, response_id: str) -> Name:
    return Name(kind=Kind.RESPONSE, tenant=tenant, id=response_id)


def no_response(response_id: str, param: str) -> ApiError:
    message = f"there is no response {shown(response_id)} of yours"
    return ApiError(404, message, code="response_not_found", param=param)


class Responses:
    """The stored responses of one server, and those of them that this front process makes."""

    def __init__(self, store: Store) -> None:
        self.owner = secrets.token_hex(8)
        self._store = store
        self._stops: dict[tuple[str, str], Stop] = {}
        self._watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def put(self, tenant: str, response_id: str, stored: StoredResponse) -> None:
        """Stores a response that begins. Raises ApiError, OverloadedError."""
        name, now, body = name_of(tenant, response_id), self._store.clock(), encoded(stored)

        def work(db: sqlite3.Connection) -> None:
            self._live(db, now)
            objects.put(db, self._store.bounds, name, body, now)

        await self._store.run(work)

    async def replace(self, tenant: str, response_id: str, stored: StoredResponse) -> None:
        """Stores a response that has ended, unless it was deleted meanwhile."""
        name, now, body = name_of(tenant, response_id), self._store.clock(), encoded(stored)

        def work(db: sqlite3.Connection) -> None:
            if objects.get(db, name, now) is not None:
                objects.put(db, self._store.bounds, name, body, now)

        await self._store.run(work)

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Returns a response. Raises ApiError (404)."""
        name, now = name_of(tenant, response_id), self._store.clock()

        def work(db: sqlite3.Connection) -> StoredResponse:
            body = objects.get(db, name, now)
            if body is None or not is_response_id(response_id):
                raise no_response(response_id, "response_id")
            stored = decoded(body)
            if stored.status != IN_PROGRESS or self._lives(db, stored.owner, now):
                return stored
            return stored.ended(FAILED, "the server ended before the response did")

        return await self._store.run(work)

    async def delete(self, tenant: str, response_id: str) -> None:
        """Removes a response, and ends it if it is being made. Raises ApiError (404)."""
        stored = await self.get(tenant, response_id)
        if stored.status == IN_PROGRESS:
            await self._ask_to_stop(tenant, response_id)
        if not await self._store.delete(Kind.RESPONSE, tenant, response_id):
            raise no_response(response_id, "response_id")

    async def forget(self, tenant: str, response_id: str) -> None:
        """Removes a response that this process has ended."""
        await self._store.delete(Kind.RESPONSE, tenant, response_id)

    async def cancel(self, tenant: str, response_id: str) -> StoredResponse:
        """Ends a response that is being made, by whatever front process, and returns it. Raises
        ApiError: 404, and 409 if it has ended."""
        stored = await self.get(tenant, response_id)
        if stored.status != IN_PROGRESS:
            message = f"the response is {stored.status} already; there is nothing to cancel"
            raise ApiError(409, message, code="response_ended", param="response_id")
        await self._ask_to_stop(tenant, response_id)
        for _ in range(round(ALIVE_SECONDS / LOOK_SECONDS)):
            await asyncio.sleep(LOOK_SECONDS / 3)
            stored = await self.get(tenant, response_id)
            if stored.status != IN_PROGRESS:
                return stored
        return stored.ended(CANCELLED, None)

    async def history(
        self, tenant: str, previous_id: str | None, references: Sequence[str], max_bytes: int
    ) -> tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]:
        """Returns the items of the conversation up to a response, and those that are named by
        their ids. What was asked for stays longer than what was not.

        Raises ApiError (404) and RequestError.
        """
        now = self._store.clock()

        def work(
            db: sqlite3.Connection,
        ) -> tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]:
            turns = self._turns(db, tenant, previous_id, max_bytes, now)
            items = [
                item
                for turn in turns
                for item in (
                    *msgspec.json.decode(turn.items, type=list[msgspec.Raw]),
                    *turn.output(),
                )
            ]
            return items, {one: _referred(db, tenant, one, now) for one in references}

        return await self._store.run(work)

    def _turns(
        self,
        db: sqlite3.Connection,
        tenant: str,
        previous_id: str | None,
        max_bytes: int,
        now: float,
    ) -> list[StoredResponse]:
        param, turns, num_bytes = "previous_response_id", list[StoredResponse](), 0
        names: list[Name] = []
        wanted = previous_id
        while wanted is not None:
            name = name_of(tenant, wanted)
            body = objects.get(db, name, now)
            if body is None:
                if not turns:
                    raise no_response(wanted, param)
                message = (
                    f"response {wanted}, which came before {previous_id}, was deleted or made room "
                    "for others; send the whole conversation as input"
                )
                raise ApiError(404, message, code="response_not_found", param=param)
            stored, num_bytes = decoded(body), num_bytes + len(body)
            if stored.status == IN_PROGRESS:
                message = f"response {wanted} has not ended yet"
                raise RequestError(message, param=param, code="response_in_progress")
            if num_bytes > max_bytes or len(turns) == MAX_TURNS:
                message = (
                    f"the conversation before {previous_id} is larger than a request may be "
                    f"({max_bytes} bytes, {MAX_TURNS} responses); begin a new one"
                )
                raise RequestError(message, param=param, code="context_length_exceeded")
            turns.append(stored)
            names.append(name)
            wanted = stored.previous_id
        for name in reversed(names):
            objects.renew(db, name)
        return turns[::-1]

    # Those that this process makes.

    def watch(self, tenant: str, response_id: str, stop: Stop) -> None:
        """Has `stop` called when somebody cancels a response, until `unwatch`."""
        self._stops[tenant, response_id] = stop
        if self._watch is None:
            self._watch = asyncio.create_task(self._look())

    def unwatch(self, tenant: str, response_id: str) -> None:
        self._stops.pop((tenant, response_id), None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets `work` run by itself; the end of the server waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends what is being made, and waits until that is stored."""
        for stop in list(self._stops.values()):
            stop()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._watch is not None:
            self._watch.cancel()

    async def _look(self) -> None:
        """Looks for marks while something is being made."""
        num_looks = 0
        renew_every = round(ALIVE_SECONDS / 3 / LOOK_SECONDS)
        while self._stops:
            keys, renews = list(self._stops), num_looks % renew_every == 0
            num_looks += 1
            with suppress(OctavoError):  # busy, or full: the next look may find more
                for key in await self._store.run(partial(self._marked, keys=keys, renews=renews)):
                    if (stop := self._stops.get(key)) is not None:
                        stop()
            await asyncio.sleep(LOOK_SECONDS)
        self._watch = None

    def _live(self, db: sqlite3.Connection, now: float) -> None:
        """Renews the mark of this process."""
        mark, until = name_of("", f"front/{self.owner}"), int(now) + ALIVE_SECONDS
        objects.put(db, self._store.bounds, mark, b"", now, expires_at=until)

    def _marked(
        self, db: sqlite3.Connection, keys: list[tuple[str, str]], renews: bool
    ) -> list[tuple[str, str]]:
        """Returns those of `keys` that somebody cancels."""
        now = self._store.clock()
        if renews:
            self._live(db, now)
        marks = {key: name_of(key[0], f"{key[1]}/cancel") for key in keys}
        found = [key for key in keys if objects.get(db, marks[key], now) is not None]
        for key in found:
            objects.clear(db, marks[key])
        return found

    def _lives(self, db: sqlite3.Connection, owner: str, now: float) -> bool:
        if owner == self.owner:
            return True
        return objects.get(db, name_of("", f"front/{owner}"), now) is not None

    async def _ask_to_stop(self, tenant: str, response_id: str) -> None:
        stop = self._stops.get((tenant, response_id))
        if stop is not None:
            stop()
            return
        until = int(self._store.clock()) + MARK_SECONDS
        mark = f"{response_id}/cancel"
        await self._store.put(Kind.RESPONSE, tenant, mark, b"", expires_at=until)


def encoded(stored: StoredResponse) -> bytes:
    return msgspec.json.encode(stored)


def decoded(body: bytes) -> StoredResponse:
    """Returns what a stored body holds; its parts are copies."""
    found = msgspec.json.decode(body, type=StoredResponse)
    parts = {"items": found.items.copy(), "response": found.response.copy()}
    return msgspec.structs.replace(found, **cast(Any, parts))


def _referred(db: sqlite3.Connection, tenant: str, item_id: str, now: float) -> msgspec.Raw:
    """Returns an output item by its id. Raises ApiError (404)."""
    response_id = response_of_item(item_id)
    body = response_id and objects.get(db, name_of(tenant, response_id), now)
    for item in decoded(body).output() if body else ():
        if msgspec.json.decode(item).get("id") == item_id:
            return item
    message = f"there is no item {shown(item_id)} of yours; send the item itself"
    raise ApiError(404, message, code="item_not_found", param="input")
