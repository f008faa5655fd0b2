"""One response while it is made: with its client, without, and in the store.

Made by `routes.responses`. Owns what becomes of a stored response whose client leaves, that is
cancelled, or that fails.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import msgspec
from starlette.requests import Request

from octavo.errors import OctavoError
from octavo.server.call import Call
from octavo.server.drain import shutting_down
from octavo.server.generation import StreamedCall, whole_call
from octavo.server.pieces import pieces_of
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_answer import CancelledResponseError, ResponseAnswer
from octavo.server.response_output import IN_PROGRESS
from octavo.server.state import server_state
from octavo.server.stored_responses import StoredResponse
from octavo.server.tenants.callers import tenant_of

logger = logging.getLogger(__name__)


class ResponseRun(StreamedCall):
    """The rounds of a response; whatever ends them, the store learns of it."""

    __slots__ = ("_answer", "_body", "_call", "_is_closed", "_state", "_tenant")

    def __init__(
        self, request: Request, body: ResponsesRequest, call: Call, answer: ResponseAnswer
    ) -> None:
        self._state = state = server_state(request)
        super().__init__(state, call)
        self._tenant = tenant_of(request)
        self._body, self._call, self._answer = body, call, answer
        self._is_closed = False

    async def store(self) -> None:
        """Stores that the response begins, if it is to be stored. Raises ApiError where the client
        insists and it cannot be."""
        body, answer = self._body, self._answer
        if body.store is False:
            return
        answer.is_stored = True
        try:
            await self._state.responses.put(self._tenant, answer.id, self._stored())
        except OctavoError as error:
            answer.is_stored = False
            if body.store or body.background:
                raise
            logger.debug("a response was not stored: %s", error)
            return
        self._state.responses.watch(self._tenant, answer.id, self._cancel)

    async def finished(self) -> None:
        """Stores what the response came to; one that cannot be is told all the same."""
        answer, state = self._answer, self._state
        if not answer.is_stored or self._is_closed:
            return
        self._is_closed = True
        state.responses.unwatch(self._tenant, answer.id)
        try:
            await state.responses.replace(self._tenant, answer.id, self._stored())
        except OctavoError as error:
            answer.is_stored = False
            logger.warning("a response was not stored: %s", error)

    async def take_all(self) -> None:
        """Makes the whole response. Raises what ended it before."""
        answer = self._answer
        if not (answer.is_stored or self._body.includes_logprobs):
            [[sequence]] = await whole_call(self._state, self._call)
            for _ in answer.take(sequence):
                pass
            return
        failure: BaseException | None = None
        try:
            self.begin()
            while not self.is_over:
                for _, delta, _ in await self.take():
                    for _ in answer.take(delta):
                        pass
            await self.finished()
        except BaseException as error:
            failure = error
            raise
        finally:
            self.close(failure)

    async def take_alone(self) -> None:
        """Makes the whole response without a client."""
        drain, answer = self._state.drain, self._answer

        def expire() -> None:
            self.stop(shutting_down())

        drain.num_open += 1
        drain.expired.watch(expire)
        try:
            with suppress(OctavoError):  # which the stored response tells
                await self.take_all()
        except Exception as error:
            logger.error("response %s failed", answer.id, exc_info=error)
        finally:
            drain.expired.unwatch(expire)
            drain.num_open -= 1
            self._call.exchange.ended()

    def close(self, error: BaseException | None) -> None:
        super().close(error)
        answer = self._answer
        if not answer.is_stored or self._is_closed:
            return
        if answer.status == IN_PROGRESS:
            # What is no failure is a client that has left.
            told = error if isinstance(error, Exception) else CancelledResponseError()
            for _ in answer.fail(told):
                pass
        is_cancelled = isinstance(error, CancelledResponseError)
        is_known = answer.is_begun or self._body.background or is_cancelled
        self._state.responses.spawn(self.finished() if is_known else self._forgotten())

    async def _forgotten(self) -> None:
        """Removes a response of which its client has not heard."""
        self._is_closed = True
        self._state.responses.unwatch(self._tenant, self._answer.id)
        with suppress(OctavoError):
            await self._state.responses.forget(self._tenant, self._answer.id)

    def _cancel(self) -> None:
        self.stop(CancelledResponseError())

    def _stored(self) -> StoredResponse:
        answer, body = self._answer, self._body
        return StoredResponse(
            status=answer.status,
            owner=self._state.responses.owner,
            previous_id=body.previous_response_id,
            items=msgspec.Raw(body.items_json),
            response=msgspec.Raw(b"".join(pieces_of(answer.response()))),
        )
