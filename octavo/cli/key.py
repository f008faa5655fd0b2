"""`octavo key new`: a key for the file of `octavo serve --keys`, which keeps its hash alone.

Called by the command line. The key goes to stdout, once; nothing of ours remembers it.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
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
    """Adds a key to a file, which others see either without it or whole."""
    from octavo.server.tenants.key_file import key_file, with_key

    try:
        before = path.read_bytes() if path.exists() else b""
        after = with_key(before, row)
        key_file(path, after)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(after)
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777 if path.exists() else 0o600)
        os.replace(file.name, path.resolve())
    except (OSError, ValueError) as error:
        raise ConfigError(f"file {path} cannot be changed: {error}", field="file") from error
