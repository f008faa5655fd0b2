"""The ASGI scope of a request: what an app is told of it.

Called by `http_protocol`, with what its parser found. Never reads a body.
"""

from __future__ import annotations

import urllib.parse
from asyncio import BaseTransport
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl


class Scopes:
    """Makes those of one connection."""

    def __init__(self, config: Config, app_state: dict[str, Any], transport: BaseTransport) -> None:
        self._root_path = config.root_path
        self._app_state = app_state
        self._same = {
            "type": "http",
            "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
            "server": get_local_addr(transport),  # type: ignore[arg-type]
            "client": get_remote_addr(transport),  # type: ignore[arg-type]
            "scheme": "https" if is_ssl(transport) else "http",  # type: ignore[arg-type]
            "root_path": config.root_path,
        }

    def of_request(
        self, method: bytes, http_version: str, url: bytes, headers: list[tuple[bytes, bytes]]
    ) -> dict[str, Any]:
        """Returns a new one; raises httptools.HttpParserInvalidURLError."""
        parts = httptools.parse_url(url)
        path = parts.path.decode("ascii")
        return {
            **self._same,
            "http_version": http_version,
            "headers": headers,
            "state": self._app_state.copy(),
            "method": method.decode("ascii"),
            "path": self._root_path + (urllib.parse.unquote(path) if "%" in path else path),
            "raw_path": self._root_path.encode() + parts.path,
            "query_string": parts.query or b"",
        }
