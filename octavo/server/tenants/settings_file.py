"""Reads a file that a server reads again while it serves: never for ever, never too much of it.

Used for the file of keys, and for files of issuers' keys.
"""

from __future__ import annotations

import stat
from pathlib import Path


def read_settings(path: Path, max_bytes: int) -> bytes:
    """Returns the content. Raises OSError, or ValueError where it is no file or a longer one: a
    device has no end, and a pipe whoever reads it first."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content
