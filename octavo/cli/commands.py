"""The commands of `octavo`: reads the command line and runs one of them.

Called by `octavo.cli.main`. Turns every OctavoError into one line and exit code 2. Neither this
module nor a command imports torch, FastAPI or transformers before a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

from octavo import __version__
from octavo.cli.options import Parser, Subparsers, say, say_verdicts
from octavo.errors import OctavoError

COMMANDS = (
    *("serve", "rank", "chat", "top", "render", "run-batch"),
    *("bench", "plan", "tune", "key", "completion", "demo"),
)
"""Each is a module beside this one, which is imported when it is wanted."""
DESCRIPTION = """Serve mixture-of-experts language models from paged memory.

MODEL is a Hugging Face id, a local folder, a .gguf file, or a demo model: demo, demo-moe."""

EXAMPLES = """examples:
  octavo serve demo-moe                        a server on http://127.0.0.1:8000
  octavo chat                                  talk to it
  octavo plan MODEL --device cuda --memory 80GiB
  octavo COMMAND --help"""


def build_parser(only: str | None = None) -> Parser:
    """Returns the parser with all commands, or with the one that is given; each sets `run` to its
    function."""
    parser = Parser(prog="octavo", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=Parser
    )
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    for name in COMMANDS if only is None else (only,):
        command: Any = importlib.import_module(f"octavo.cli.{name.replace('-', '_')}")
        command.add_parser(cast(Subparsers, subparsers))
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; exits with code 2 if it has mistakes."""
    only = argv[0] if argv and argv[0] in COMMANDS else None
    return build_parser(only).parse_checked(argv)


def run(args: argparse.Namespace) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 for Ctrl-C."""
    if args.command != "serve":  # whose stderr may be a log
        say_verdicts(args.verdicts)
    try:
        code = args.run(args)
        print(end="", flush=True)
        return code
    except OctavoError as error:
        say(f"octavo {args.command}: error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough, `| head` say; nor may Python's exit write to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
