"""One line of a batch through the code of its route: the same checks, the same answer.

Called by `worker`. Neither sockets nor middlewares are on the way: who asks is known already, and
batches have a priority, a room for bodies and an end of their own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

from starlette.requests import Request
from starlette.types import Message, Scope

from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.request_limits import MAX_INT
from octavo.server.audit import AuditLog
from octavo.server.drain import Drain
from octavo.server.errors import ApiError, error_response, on_error
from octavo.server.exchange import Exchange
from octavo.server.guards.gate import UNAVAILABLE
from octavo.server.limits import BodyRoom
from octavo.server.state import ServerState
from octavo.server.tenants.budgets import CODE
from octavo.server.tenants.callers import TENANT_SCOPES, Caller, Tenant

PRIORITY = MAX_INT
"""Behind all others."""


FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 5.0
"""Before something is tried again, twice as long each time."""


class AgainError(OctavoError):
    """The line was not at fault: it is to be run again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answered."""

    status: int
    body: bytes


class LineCalls:
    """Runs lines for the tenants that this server knows."""

    def __init__(self, state: ServerState) -> None:
        self._keyring = state.keyring
        self._audit = state.audit
        self._handlers = state.batch_handlers
        room = BodyRoom(state.body_room.max_body_bytes)
        own = replace(state, drain=Drain(), body_room=room, priority=PRIORITY)
        self._app = SimpleNamespace(state=SimpleNamespace(server=own))

    def knows(self, tenant: str) -> bool:
        """Whether the tenant of that id may still ask for anything."""
        return self._keyring.tenant_of_id(tenant) is not None

    async def run_patiently(
        self, tenant: str, endpoint: str, content: bytes, request_id: str
    ) -> Answer:
        """As `run`, again and again while the engine has no room."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self.run(tenant, endpoint, content, request_id)
            except AgainError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def run(self, tenant: str, endpoint: str, content: bytes, request_id: str) -> Answer:
        """Returns the answer to a body, errors of the client and of the server among them.

        Raises AgainError where the engine had no room, EngineDeadError.
        """
        known = self._keyring.tenant_of_id(tenant)
        if known is None:
            raise AgainError("its tenant is not let in any more")
        scope = self._scope(known, endpoint, content, request_id)
        answer = await self._answer(scope, content)
        if self._audit is not None:
            self._record(self._audit, scope, answer)
        return answer

    def _record(self, audit: AuditLog, scope: Scope, answer: Answer) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        audit.record(
            exchange,
            scope,
            route=scope["path"],
            status=answer.status,
            seconds=time.monotonic() - exchange.started,
            num_bytes=len(answer.body),
        )

    def _scope(self, known: Tenant, endpoint: str, content: bytes, request_id: str) -> Scope:
        # What lines may do was checked when the batch was made.
        caller = Caller(name="batch", tenant=known, scopes=TENANT_SCOPES)
        exchange = Exchange(request_id)
        if self._audit is not None:
            self._audit.begin(exchange)
        return {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(content)),
            ],
            "client": None,
            "server": None,
            "app": self._app,
            "extensions": {},
            "state": {
                "caller": caller,
                "request_id": request_id,
                "exchange": exchange,
            },
        }

    async def _answer(self, scope: Scope, content: bytes) -> Answer:
        endpoint = scope["path"]
        handler = self._handlers.get(endpoint)
        exchange = _Exchange(content)
        request = Request(scope, exchange.receive)
        try:
            if handler is None:
                message = f"{endpoint} is not served here; use another route"
                raise ApiError(404, message, code="unsupported_route")
            response = await handler(request)
            await response(scope, exchange.receive, exchange.send)
        except (OverloadedError, EngineDeadError) as error:
            raise _again(error) from error
        except ApiError as error:
            if error.code in ("aborted", CODE, UNAVAILABLE):
                raise _again(error) from error
            response = await on_error(request, error)
            return Answer(response.status_code, bytes(response.body))
        except OctavoError as error:
            response = await on_error(request, error)
            return Answer(response.status_code, bytes(response.body))
        except Exception as error:
            # The edge, as for a request: what no handler expected is logged and told as a 500.
            response = error_response(error, scope)
            return Answer(response.status_code, bytes(response.body))
        return Answer(exchange.status, b"".join(exchange.pieces))


def _again(error: OctavoError) -> OctavoError:
    return error if isinstance(error, EngineDeadError) else AgainError(str(error))


class _Exchange:
    """Both ends of a request without a connection."""

    def __init__(self, content: bytes) -> None:
        self._content: bytes | None = content
        self.status = 0
        self.pieces: list[bytes] = []

    async def receive(self) -> Message:
        if self._content is None:
            await asyncio.Event().wait()  # The client never leaves.
        content, self._content = self._content, None
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.pieces.append(message.get("body", b""))
