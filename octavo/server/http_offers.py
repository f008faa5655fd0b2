"""Requests that offer to go on in another protocol, and the parser that reads them.

Called by `http_protocol`, which stays in HTTP/1.1. Never answers.
"""

from __future__ import annotations

from typing import Any

import httptools


def new_parser(protocol: object) -> Any:
    """Returns a parser that calls `protocol`."""
    parser = httptools.HttpRequestParser(protocol)
    # What follows a request that closes the connection is no error: it is not answered.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def head_without_offer(parser: Any, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Returns the head that `parser` has read, as it would be if nothing else were offered."""
    line = b"%b %b HTTP/%b\r\n" % (parser.get_method(), url, parser.get_http_version().encode())
    kept = (b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade")
    return line + b"".join(kept) + b"\r\n"
