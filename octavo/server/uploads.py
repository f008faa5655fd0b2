"""Uploads of files: multipart forms, written to the store's disk as they come.

Called by `routes.files`. Of a form little is in memory at any time, however long its file is; what
is not finished leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from octavo.errors import RequestError, shown
from octavo.server.errors import ApiError, ClientDisconnectedError
from octavo.server.headers import header
from octavo.server.store.contents import Contents, Draft

MAX_FILE_BYTES = 512 * 2**20
MAX_FORM_BYTES = 64 * 1024
"""Of all that a form has beside its file."""
MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
FLUSH_BYTES = 256 * 1024
"""Kept in memory of a file before it is written."""
MAX_NAME_CHARS = 255


@dataclass(slots=True)
class Form:
    """What came of a form: its fields, and of its file the name."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""


@dataclass(slots=True)
class Upload:
    """A form whose file lies on the disk, but not in its place yet."""

    form: Form
    draft: Draft


@asynccontextmanager
async def received(request: Request, contents: Contents, id: str) -> AsyncGenerator[Upload, None]:
    """Receives a form whose file becomes the content `id` once `draft.finish` is called; if it is
    not, nothing is left.

    Raises RequestError, ApiError (413, and the store's), OverloadedError, ClientDisconnectedError.
    """
    check_length(request)
    parts = _Parts(_boundary(request))
    draft = await contents.begin(id)
    try:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError("the client left before its upload was complete")
            parts.feed(message.get("body", b""))
            more = message.get("more_body", False)
            if parts.num_waiting >= FLUSH_BYTES or not more:
                await draft.write(parts.taken())
        yield Upload(parts.end(), draft)
    finally:
        await draft.close()


def check_length(request: Request) -> int:
    """Returns how long the body says that it is, 0 if it does not. Raises ApiError (413)."""
    length = header(request.scope, b"content-length")
    num_bytes = int(length[:20]) if length.isdecimal() else 0
    if num_bytes > MAX_FILE_BYTES + MAX_FORM_BYTES:
        raise _too_large()
    return num_bytes


def _too_large() -> ApiError:
    message = f"the file has more than {MAX_FILE_BYTES} bytes; send it in several"
    return ApiError(413, message, code="body_too_large", param="file")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(header(request.scope, b"content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        message = "the body was not read as a form; send multipart/form-data with file and purpose"
        raise RequestError(message, code="not_multipart")
    return boundary


class _Parts:
    """Takes a form apart, piece by piece."""

    def __init__(self, boundary: bytes) -> None:
        self._form = Form()
        self._seen: set[str] = set()
        self._file: list[bytes] = []
        self.num_waiting = 0
        self._num_file_bytes = 0
        self._num_bytes = 0
        self._name = ""
        self._value = b""
        self._header_name, self._header_value = b"", b""
        self._is_over = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _bad_form(str(error)) from error

    def feed(self, piece: bytes) -> None:
        """Raises RequestError, ApiError (413)."""
        self._num_bytes += len(piece)
        try:
            if piece:
                self._parser.write(piece)
        except FormParserError as error:
            raise _bad_form(str(error)) from error
        if self._num_file_bytes > MAX_FILE_BYTES:
            raise _too_large()
        if self._num_bytes - self._num_file_bytes > MAX_FORM_BYTES:
            raise _bad_form(f"it has more than {MAX_FORM_BYTES} bytes beside its file")

    def taken(self) -> list[bytes]:
        """Returns what has come of the file and was not taken yet."""
        taken, self._file, self.num_waiting = self._file, [], 0
        return taken

    def end(self) -> Form:
        """Returns the form. Raises RequestError if it is not complete."""
        if not self._is_over:
            raise _bad_form("it ends before its last boundary")
        if "file" not in self._seen:
            message = "file is missing; send it as a part of the form, with a filename"
            raise RequestError(message, param="file", code="missing_field")
        return self._form

    def _on_part_begin(self) -> None:
        self._name, self._value = "", b""
        self._header_name, self._header_value = b"", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if self._name == "file":
                name = options.get(b"filename", b"").decode("utf-8", "replace")
                self._form.filename = name[:MAX_NAME_CHARS]
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        if not self._name:
            raise _bad_form("a part has no name")
        if self._name in self._seen:
            name = shown(self._name)
            raise RequestError(f"{name} is in the form twice", param=self._name[:MAX_NAME_CHARS])
        if len(self._seen) >= MAX_FIELDS:
            raise _bad_form(f"it has more than {MAX_FIELDS} fields")
        self._seen.add(self._name)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._name == "file":
            self._file.append(piece)
            self.num_waiting += len(piece)
            self._num_file_bytes += len(piece)
            return
        self._value += piece
        if len(self._value) > MAX_FIELD_BYTES:
            message = f"{shown(self._name)} has more than {MAX_FIELD_BYTES} bytes"
            raise RequestError(message, param=self._name[:MAX_NAME_CHARS], code="invalid_value")

    def _on_part_end(self) -> None:
        if self._name != "file":
            try:
                self._form.fields[self._name] = self._value.decode()
            except UnicodeDecodeError as error:
                message = f"{shown(self._name)} is no UTF-8"
                raise RequestError(message, param=self._name[:MAX_NAME_CHARS]) from error

    def _on_end(self) -> None:
        self._is_over = True


def _bad_form(reason: str) -> RequestError:
    return RequestError(f"the body is not a valid form: {reason}", code="bad_multipart")
