"""What a connection is told that is not served: no request of it reaches the app.

Called by `http_protocol`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.server.errors import ApiError, error_body, error_response

RETRY_AFTER_SECONDS = 1
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
}


def raw_response(error: ApiError) -> bytes:
    """Returns the whole answer of a connection that ends where no app could be asked."""
    body = msgspec.json.encode(error_body(error))
    head = (
        f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def surplus(scope: Any, receive: Any, send: Any) -> None:
    """The app of connections beyond the limit."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "Connection": "close"}
    message = "the server has as many connections as it may have; try again later"
    error = ApiError(503, message, code="too_many_connections", headers=headers)
    await error_response(error, scope)(scope, receive, send)


def headers_too_large(max_bytes: int, max_headers: int) -> ApiError:
    """Returns the error of a request with more line and headers than are taken."""
    message = (
        f"the request's line and headers have more than {max_bytes} bytes or {max_headers} headers"
    )
    return ApiError(431, message, code="headers_too_large")
