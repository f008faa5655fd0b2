"""`octavo demo`: gets the demo models and says where they lie and what they are.

Called by the command line. Paths go to stdout, progress and explanations to stderr.
"""

from __future__ import annotations

import argparse

from octavo.cli.options import Subparsers, say

HELP = "get the demo models: a small dense one, and a MoE model made of it"

EXAMPLES = """examples:
  octavo demo                                  get both
  octavo demo --moe --experts 8                the MoE model with 8 experts
  octavo serve "$(octavo demo --moe --path-only)\""""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `demo`."""
    parser = subparsers.add_parser("demo", help=HELP, description=HELP, epilog=EXAMPLES)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dense", action="store_true", help="only the dense model, demo")
    which.add_argument("--moe", action="store_true", help="only the MoE model, demo-moe")
    parser.add_argument(
        "--experts",
        type=_num_experts,
        default=4,
        metavar="N",
        help="experts of the MoE model, 2 to 64 (default 4); each token goes to two",
    )
    parser.add_argument("--path-only", action="store_true", help="print nothing but the paths")
    parser.set_defaults(run=run, parser=parser)


def _num_experts(text: str) -> int:
    if text.isascii() and text.isdigit() and 2 <= int(text) <= 64:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of experts; give 2 to 64")


def run(args: argparse.Namespace) -> int:
    """Prints the path of each model. Raises ModelNotFoundError if one cannot be fetched."""
    from octavo.weights.demo import DEMO_DESCRIPTIONS, DEMO_EXPERTS, demo_path

    names = ["demo"] * (not args.moe) + ["demo-moe"] * (not args.dense)
    path = None
    for name in names:
        path = demo_path(name, args.experts)
        if not args.path_only:
            say(f"{name}: {DEMO_DESCRIPTIONS[name]}")
        print(path, flush=True)
    if not args.path_only:
        is_named = names[-1] == "demo" or args.experts == DEMO_EXPERTS
        say(f"serve it with: octavo serve {names[-1] if is_named else path}")
    return 0
