"""Command lines that stand in manifests."""

from __future__ import annotations

import re
from typing import Any

from octavo.cli.commands import build_parser


def check_arguments(argv: list[str]) -> Any:
    """Returns the parsed arguments of a server; a mistake would exit."""
    plain = [re.sub(r"\{\{.*?\}\}", "name", one) for one in argv]
    args = build_parser().parse_checked(plain)
    assert args.command == "serve"
    return args
