"""An input file, line by line: what each asks for, or what is wrong with it.

Called by `worker`, whose threads read: no file is ever whole in memory. Never runs a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import RequestError, shown
from octavo.server.protocol.batches import BatchLine
from octavo.server.protocol.decoding import decode
from octavo.server.protocol.parsing import parse

MAX_LINES = 50_000
MAX_BESIDES_BYTES = 8192
"""Of a line beside its body."""
CHUNK_BYTES = 2**20
"""Read at once, and what is over to the end of the line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not empty."""

    number: int
    """From 1 on; empty lines count."""
    custom_id: str | None
    url: str = ""
    """The route that it is for."""
    body: bytes = b""
    """The JSON of its request."""
    error: RequestError | None = None


class LineReader:
    """Reads a file in chunks of lines. `next` is to be called in one thread at a time."""

    def __init__(self, path: Path, endpoints: Sequence[str], max_line_bytes: int) -> None:
        """`endpoints` are the routes that lines may be for. Raises OSError."""
        self._file = path.open("rb")
        self._endpoints = endpoints
        self._max_line_bytes = max_line_bytes
        self._number = 0

    def next(self, skipped: frozenset[int] | set[int] = frozenset()) -> list[Line] | None:
        """Returns the lines of the next chunk but for those in `skipped`; None at the end."""
        lines, num_bytes = [], 0
        while num_bytes < CHUNK_BYTES:
            content = self._file.readline(self._max_line_bytes + 1)
            if not content:
                return lines or None
            self._number += 1
            is_long = len(content) > self._max_line_bytes
            is_cut = is_long and not content.endswith(b"\n")
            num_bytes += len(content) + (self._skip_rest() if is_cut else 0)
            if content.strip() and self._number not in skipped:
                lines.append(self._read(content, is_long))
        return lines

    def _skip_rest(self) -> int:
        num_bytes = 0
        while piece := self._file.readline(CHUNK_BYTES):
            num_bytes += len(piece)
            if piece.endswith(b"\n"):
                break
        return num_bytes

    def _read(self, content: bytes, is_long: bool) -> Line:
        number = self._number
        if is_long:
            limit = self._max_line_bytes
            message = f"line {number} has more than {limit} bytes, the limit of a request's body"
            return Line(number, None, error=RequestError(message, code="body_too_large"))
        custom_id = None
        try:
            data = decode(content)
            custom_id = _custom_id(data)
            line = parse(BatchLine, data)
            if line.url not in self._endpoints:
                one, *more = self._endpoints
                wanted = (
                    f"one of {one}, {', '.join(more)}" if more else f"the batch's endpoint, {one}"
                )
                message = f"url must be {wanted}, got {shown(line.url)}"
                raise RequestError(message, param="url", code="invalid_value")
            for name in ("stream", "background"):
                if line.body.get(name):
                    message = f"body.{name} must be false: a batch has its answers at its end"
                    raise RequestError(message, param=f"body.{name}", code="invalid_value")
        except RequestError as error:
            told = RequestError(f"line {number}: {error}", param=error.param, code=error.code)
            return Line(number, custom_id, error=told)
        return Line(number, line.custom_id, line.url, json.dumps(line.body).encode())

    def close(self) -> None:
        self._file.close()


def _custom_id(data: Any) -> str | None:
    """Returns the id that a client gave a line, also if the line is wrong otherwise."""
    found = data.get("custom_id") if isinstance(data, dict) else None
    return found[:512] if isinstance(found, str) else None


class Repetitions:
    """Finds lines whose `custom_id` another line had before."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def checked(self, lines: list[Line]) -> Iterator[Line]:
        """Yields the lines, those that repeat an id with an error."""
        for line in lines:
            if line.error is None and line.custom_id is not None:
                key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
                first = self._seen.setdefault(key, line.number)
                if first != line.number:
                    message = (
                        f"line {line.number}: custom_id {shown(line.custom_id)} is that of line "
                        f"{first}; each line needs its own"
                    )
                    error = RequestError(message, param="custom_id", code="custom_id_repeated")
                    line = Line(line.number, line.custom_id, error=error)
            yield line
