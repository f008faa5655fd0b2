"""Which C++ sources a library was built from. The standard library alone: setup.py runs this file.

Used by setup.py, which puts it into the library, and by `library`, which compares.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str | None:
    """Returns a hash of all sources in `folder`; None where there are none, as in a wheel."""
    digest = hashlib.sha256()
    sources = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")], key=lambda path: path.name)
    for path in sources:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16] if sources else None
