"""`octavo demo`: gets the demo models and says where they lie and what they are.

Called by the command line. Paths go to stdout, progress and explanations to stderr.
"""

from __future__ import annotations

import argparse

from octavo.cli.options import Subparsers, say

HELP = "get the demo models: a small dense one, and a MoE model made of it"

EXAMPLES = """examples:
  octavo demo                                  get both
  octavo serve "$(octavo demo --moe --path-only)\""""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `demo`."""
    parser = subparsers.add_parser("demo", help=HELP, description=HELP, epilog=EXAMPLES)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dense", action="store_true", help="only the dense model, demo")
    which.add_argument("--moe", action="store_true", help="only the MoE model, demo-moe")
    parser.add_argument("--path-only", action="store_true", help="print nothing but the paths")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints the path of each model. Raises ModelNotFoundError if one cannot be fetched."""
    from octavo.weights.demo import DEMO_DESCRIPTIONS, demo_path

    names = ["demo"] * (not args.moe) + ["demo-moe"] * (not args.dense)
    for name in names:
        path = demo_path(name)
        if not args.path_only:
            say(f"{name}: {DEMO_DESCRIPTIONS[name]}")
        print(path, flush=True)
    if not args.path_only:
        say(f"serve it with: octavo serve {names[-1]}")
    return 0
