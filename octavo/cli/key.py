"""`octavo key new`: a key for the file of `octavo serve --keys`, which keeps its hash alone.

Called by the command line. The key goes to stdout, once; nothing of ours remembers it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli.options import Subparsers, say
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.server.tenants.key_file import KeyRow

HELP = "make a key for the file of octavo serve --keys"
EXAMPLES = """examples:
  octavo key new alice --file keys.toml
  octavo key new ci --tenant team-a --scope embed --file keys.toml
  octavo key new prometheus --scope metrics"""
SCOPES = ("generate", "embed", "metrics", "operate")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `key`."""
    parser = subparsers.add_parser("key", help=HELP, description=HELP, epilog=EXAMPLES)
    add = parser.add_argument
    add("action", choices=("new",), metavar="new", help="what is done with it")
    add("name", metavar="NAME", help="of the key, as logs show it")
    add("--tenant", metavar="NAME", help="whose key it is (default: a tenant of the key's name)")
    add(
        "--scope",
        dest="scopes",
        action="append",
        choices=SCOPES,
        help="what it is for; again for several (default: generate and embed)",
    )
    add("--file", metavar="FILE", help="file to add it to (default: print what to add)")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints a new key. Raises ConfigError if the file cannot be read, changed or used."""
    from octavo.server.tenants.callers import Scope
    from octavo.server.tenants.key_file import NAME, KeyRow, hash_of, new_key, with_key

    for option in ("name", "tenant"):
        given = getattr(args, option)
        if given is not None and not re.fullmatch(NAME, given):
            message = f"{option} must be letters, digits and . _ @ / -, got {given!r}"
            raise ConfigError(message, field=option)
    key = new_key()
    scopes = frozenset(map(Scope, args.scopes or SCOPES[:2]))
    row = KeyRow(name=args.name, tenant=args.tenant, hash=hash_of(key), scopes=scopes)
    if args.file is None:
        say(with_key(b"", row).decode().rstrip())
    else:
        _add(Path(args.file), row)
        say(f"its hash was added to {args.file}; the key itself is kept nowhere:")
    print(key, flush=True)
    return 0


def _add(path: Path, row: KeyRow) -> None:
    """Adds a key to a file, which others see either without it or whole, and keeps whose it is."""
    from octavo.server.tenants.key_file import MAX_FILE_BYTES, key_file, with_key
    from octavo.server.tenants.settings_file import read_settings

    path = path.resolve()
    try:
        with _locked(path.parent):
            there = path.stat() if path.exists() else None
            before = b"" if there is None else read_settings(path, MAX_FILE_BYTES)
            after = with_key(before, row)
            key_file(path, after)
            _replace(path, after, there)
    except (OSError, ValueError) as error:
        raise ConfigError(f"file {path} cannot be changed: {error}", field="file") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others who add a key to a file of a folder waiting. The file itself is replaced, and
    a file beside it would stay."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # file systems of networks may lock no folders
            say(f"{folder} cannot be locked ({error.strerror}): add one key at a time")
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes, there: os.stat_result | None) -> None:
    """Raises ValueError where the owner cannot be kept: the server could not read the file then."""
    descriptor, made = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            if there is not None:
                ours = os.fstat(descriptor)
                if (ours.st_uid, ours.st_gid) != (there.st_uid, there.st_gid):
                    _give(descriptor, there)
                os.fchmod(descriptor, there.st_mode & 0o777)
        os.replace(made, path)
    except BaseException:
        os.unlink(made)
        raise


def _give(descriptor: int, there: os.stat_result) -> None:
    try:
        os.fchown(descriptor, there.st_uid, there.st_gid)
    except PermissionError as error:
        owner = f"user {there.st_uid} and group {there.st_gid}"
        raise ValueError(f"it belongs to {owner}; run this as that user, or as root") from error
