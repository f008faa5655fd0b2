"""Folders that Octavo writes into: what goes wrong there is one line that names the folder.

Used by whoever keeps something (demo models, launch shapes, downloads, sockets). Never decides
where that is: see `config`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.errors import ConfigError

CACHE_WAY_OUT = "set OCTAVO_CACHE to a folder that can be written"


@contextmanager
def writing(folder: str | Path, way_out: str) -> Iterator[None]:
    """Makes `folder` if it is not there. Raises ConfigError with `way_out` where it cannot be made,
    or where what is done within cannot write."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"the folder {folder} cannot be written: {reason}; {way_out}") from error


def check_writable(folder: str | Path, way_out: str) -> None:
    """Raises ConfigError unless files can be made in `folder`, which is made if it is not there."""
    with writing(folder, way_out), tempfile.TemporaryFile(dir=folder):
        pass


def new_temporary_folder() -> Path:
    """Returns a new folder that the caller removes. Raises ConfigError."""
    with _making():
        return Path(tempfile.mkdtemp(prefix="octavo-"))


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Returns a new folder that is removed when it is closed. Raises ConfigError."""
    with _making():
        return tempfile.TemporaryDirectory(prefix="octavo-")


@contextmanager
def _making() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"no temporary folder can be made: {reason}; set TMPDIR to one that can be written"
        ) from error
