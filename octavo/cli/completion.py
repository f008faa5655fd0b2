"""`octavo completion`: a script that lets a shell complete commands and options.

Called by the command line. The script is made by `shtab` of the parser itself.
"""

from __future__ import annotations

import argparse

from octavo.cli.options import Subparsers

HELP = "print a script that lets a shell complete commands and options"
EXAMPLES = """examples:
  octavo completion bash > ~/.local/share/bash-completion/completions/octavo
  octavo completion zsh > "${fpath[1]}/_octavo\""""
SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `completion SHELL`."""
    parser = subparsers.add_parser("completion", help=HELP, description=HELP, epilog=EXAMPLES)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or tcsh")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    from octavo.cli.commands import build_parser

    print(shtab.complete(build_parser(), args.shell))
    return 0
