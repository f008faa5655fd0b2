"""What clients are told when the store's disk fails them, and the way out.

Used by `database` and `contents`. Never logs: the errors are answers.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.server.errors import ApiError

WAY_OUT = "start the server with a --store-dir that can be written"
_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_full(folder: Path) -> ApiError:
    """Returns what is told where the disk has no room."""
    message = f"the disk of the store ({folder}) is full; free some of it, or {WAY_OUT}"
    return ApiError(507, message, code="store_full")


def unavailable(folder: Path, reason: str) -> ApiError:
    """Returns what is told where the store cannot be used."""
    message = f"the store in {folder} cannot be used: {reason}; {WAY_OUT}"
    return ApiError(503, message, code="store_unavailable")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what goes wrong with files into answers: ApiError."""
    try:
        yield
    except OSError as error:
        if error.errno in _IS_FULL:
            raise disk_full(folder) from error
        raise unavailable(folder, error.strerror or str(error)) from error
