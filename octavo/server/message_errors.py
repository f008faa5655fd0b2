"""Errors in Anthropic's form, for the routes of its API and those alone.

Called by `errors`, which knows what went wrong. Never decides whether something is an error.
"""

from __future__ import annotations

from typing import Any

_PREFIX = "/v1/messages"
OVERLOADED = 529
"""The status that Anthropic's clients know for a server with too much to do."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
_INVALID, _INTERNAL = "invalid_request_error", "api_error"
TYPES = sorted({*_TYPES.values(), _INVALID, _INTERNAL})
"""All that `message_error` tells."""


def is_message_path(path: str) -> bool:
    """Whether a path is one of Anthropic's API, served or not."""
    return path == _PREFIX or path.startswith(_PREFIX + "/")


def message_status(status: int, code: str | None) -> int:
    """Returns the status that stands for ours on these routes."""
    return OVERLOADED if status == 503 and code == "overloaded" else status


def message_error(status: int, message: str, request_id: str) -> dict[str, Any]:
    """Returns Anthropic's error object."""
    kind = _TYPES.get(status, _INVALID if status < 500 else _INTERNAL)
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": request_id}
