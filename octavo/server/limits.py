"""The largest request body, checked before and while it is read.

A middleware around the app; never keeps a body.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.errors import ApiError, BodyTooLargeError, error_response


class BodyLimitMiddleware:
    """Answers 413 to bodies over `max_bytes`, whether they say their length or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._max_bytes:
            too_large = BodyTooLargeError(self._max_bytes)
            headers = too_large.headers
            error = ApiError(413, too_large.detail, code="body_too_large", headers=headers)
            await error_response(error)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise BodyTooLargeError(self._max_bytes)
            return message

        await self._app(scope, receive_counted, send)
