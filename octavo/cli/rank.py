"""`octavo rank`: one tensor parallel rank of an engine whose rank 0 is on another host.

Called by the command line. Comes to the address that `octavo serve --rank-address` listens on, gets
the options from there, and ends with rank 0.
"""

from __future__ import annotations

import argparse

from octavo.cli.options import Subparsers, say
from octavo.config.environment import rank_key
from octavo.config.fields import read_address
from octavo.errors import ConfigError

HELP = "be one rank of an engine on another host"
EXAMPLES = """examples, of one engine on two hosts, where OCTAVO_RANK_KEY is the same:
  octavo serve MODEL --tensor-parallel-size 2 --rank-address 10.0.0.1:7100     on 10.0.0.1
  octavo rank --address 10.0.0.1:7100 --rank 1                                 on the other
  CUDA_VISIBLE_DEVICES=1 octavo rank --address 10.0.0.1:7100 --rank 1          on the same"""
WAIT_SECONDS = 600.0


def add_parser(subparsers: Subparsers) -> None:
    """Adds `rank`."""
    parser = subparsers.add_parser("rank", help=HELP, description=HELP, epilog=EXAMPLES)
    add = parser.add_argument
    add("--address", required=True, metavar="HOST:PORT", help="where rank 0 waits: --rank-address")
    add("--rank", required=True, type=int, metavar="N", help="from 1 on")
    add(
        "--wait",
        type=float,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"how long rank 0 may take to be there (default: {WAIT_SECONDS:g})",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Runs the rank until rank 0 ends it; returns 0, or 1 if it failed. Raises ConfigError, and
    EngineDeadError if it does not find rank 0."""
    host, port = read_address("address", args.address)
    if args.rank < 1:
        message = f"rank must be 1 or more (rank 0 is in octavo serve), got {args.rank}"
        raise ConfigError(message, field="rank")
    if not 0 < args.wait < float("inf"):
        raise ConfigError(f"wait must be seconds above 0, got {args.wait}", field="wait")
    key = rank_key()
    from octavo.engine.rank import repeat
    from octavo.engine.rank_transport import join
    from octavo.observe.logs import configure_logging

    configure_logging("text", "info", owns_stderr=True)
    if repeat(join(f"{host}:{port}", key, args.rank, args.wait)):
        return 0
    say(f"rank {args.rank} has failed; why is in the log of rank 0")
    return 1
