"""Errors of the API: one JSON shape (OpenAI's error object, Anthropic's on its routes) for whatever
goes wrong.

`install` registers the handlers of expected errors with the app; middlewares and streams use
`error_body` and `error_response`, also for unexpected ones. Never shows a traceback to the client.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from octavo.constraint import FORM_TOO_LARGE
from octavo.errors import (
    EngineDeadError,
    OctavoError,
    OverloadedError,
    RequestError,
    SlowReaderError,
)
from octavo.server.message_errors import is_message_path, message_error, message_status
from octavo.server.wrong_paths import explain

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class ApiError(OctavoError):
    """An error with its HTTP status, raised by the server itself."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
    ) -> None:
        """`kind` is the type of OpenAI's error object, if not that of its status."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers
        self.kind = kind


class ClientDisconnectedError(OctavoError):
    """The client has gone; nobody will read the answer."""


def _describe(error: Exception) -> ApiError:
    """Returns what the client is told about `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code=error.code, param=error.param)
    if isinstance(error, OverloadedError):
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return ApiError(503, str(error), code="overloaded", headers=headers)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error) or "the engine has ended", code="engine_dead")
    if isinstance(error, SlowReaderError):
        return ApiError(408, str(error), code="slow_reader")
    if isinstance(error, ClientDisconnectedError):
        return ApiError(499, "the client closed the connection", code="client_disconnected")
    logger.error("a request ended with an internal error", exc_info=error)
    message = "an internal error; the server's log has the details"
    return ApiError(500, message, code="internal_error")


def error_body(error: Exception) -> dict[str, Any]:
    """Returns OpenAI's error object for `error`."""
    told = _describe(error)
    kind = told.kind or (INVALID_REQUEST if told.status < 500 else SERVER_ERROR)
    fields = {"message": str(told), "type": kind, "param": told.param, "code": told.code}
    return {"error": fields}


def message_error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """Returns Anthropic's error object for `error`."""
    told = _describe(error)
    return message_error(message_status(told.status, told.code), str(told), request_id)


def error_response(error: Exception, scope: Scope) -> Response:
    """Returns the HTTP response for `error`: its status, headers and error object, in the form of
    the route that was asked."""
    told = _describe(error)
    status = told.status
    exchange = scope.get("state", {}).get("exchange")
    if exchange is not None:
        exchange.code = told.code or ""
    if is_message_path(scope["path"]):
        status = message_status(status, told.code)
        body = message_error(status, str(told), scope.get("state", {}).get("request_id", ""))
    else:
        body = error_body(told)
    headers = dict(told.headers or {})
    # Not msgspec: messages may quote lone surrogates of the client, which only ASCII JSON survives.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Makes every expected error of `app` an error object."""
    app.add_exception_handler(OctavoError, on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def on_error(request: Request, error: Exception) -> Response:
    """Returns the answer to an error of a handler; it names the fields that the client sent."""
    body = request.scope["state"].get("body")
    if isinstance(error, RequestError) and error.param is not None and body is not None:
        # The engine speaks of its own parameters; the client knows the fields that it sent.
        error.param = body.field_name(error.param)
        if error.param not in str(error):
            error.args = (f"{error.param}: {error}",)
    return error_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    message, code, headers = error.detail, None, error.headers
    if error.status_code == 404:
        message, code = explain(method, path, request.app.openapi()["paths"])
    elif error.status_code == 405:
        message, code = (
            f"{method} {path} is not allowed; see the Allow header",
            "method_not_allowed",
        )
        # The framework tells those of the first route of this path.
        headers = {**(headers or {}), "Allow": ", ".join(_methods(request))}
    told = ApiError(error.status_code, message, code=code, headers=headers)
    return error_response(told, request.scope)


def _methods(request: Request) -> Iterator[str]:
    """Yields the methods that routes of this path have."""
    for method in _METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            yield method


def broken_off(reason: str) -> ApiError:
    """Returns the error of a sequence that the engine has given up."""
    if reason.startswith(FORM_TOO_LARGE):
        return ApiError(400, f"{reason}; ask for a smaller form", code="form_too_large")
    message = f"the engine could not finish this request: {reason}"
    return ApiError(500, message, code="engine_error")
