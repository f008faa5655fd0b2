"""`octavo bench`: figures that can be repeated. One JSON line a result, a table for the person.

Called by the command line. Only reads options here; each benchmark is a module beside this one,
imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
from typing import cast

from octavo.cli.bench.shapes import MODELS, NAMES, parse_names
from octavo.cli.bench.workload import Lengths, parse_goodput, parse_lengths, positive
from octavo.cli.options import Parser, Subparsers, add_options
from octavo.config import EngineConfig

_HOMES = {
    "latency": ("octavo.cli.bench.offline", "run_latency"),
    "throughput": ("octavo.cli.bench.offline", "run_throughput"),
    "serve": ("octavo.cli.bench.serve", "run_serve"),
    "compare": ("octavo.cli.bench.compare", "run_compare"),
    "prefix": ("octavo.cli.bench.prefix", "run_prefix"),
    "workloads": ("octavo.cli.bench.workloads", "run_workloads"),
}

EXAMPLES = """examples:
  octavo bench latency demo-moe
  octavo bench serve --concurrency 64"""
_EXAMPLES = {
    "latency": """examples:
  octavo bench latency demo-moe --batch-size 4 --output figures.jsonl
  octavo bench latency demo --peer transformers""",
    "throughput": """example:
  octavo bench throughput demo-moe --num-prompts 64 --input-len 100:1000""",
    "serve": """examples:
  octavo bench serve --concurrency 64 --waves 4 --clients 4 --input-len 512
  octavo bench serve --url http://host:8000 --request-rate 5 --goodput ttft:500""",
    "compare": """example:
  octavo bench compare --url http://127.0.0.1:8000 --url http://127.0.0.1:9000""",
    "prefix": """example:
  octavo bench prefix demo-moe --prefix-len 1024""",
    "workloads": """example:
  octavo bench workloads qwen3-30b-a3b --only D1,D32""",
}


def add_parser(subparsers: Subparsers) -> None:
    """Adds `bench` with its benchmarks."""
    help = "measure throughput, latency, one server or two, prefix caching, or named workloads"
    parser = subparsers.add_parser("bench", help=help, description=help, epilog=EXAMPLES)
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    benches = cast(
        Subparsers,
        parser.add_subparsers(
            title="benchmarks",
            metavar="BENCHMARK",
            dest="bench",
            parser_class=Parser,
        ),
    )
    _add_latency(benches)
    _add_throughput(benches)
    _add_serve(benches)
    _add_compare(benches)
    _add_prefix(benches)
    _add_workloads(benches)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen benchmark."""
    module, name = _HOMES[args.bench]
    return vars(importlib.import_module(module))[name](args)


def _new(
    benches: Subparsers,
    name: str,
    help: str,
    *,
    seed: int | None = 0,
    seed_help: str = "of prompts and lengths (default: 0)",
) -> Parser:
    parser = benches.add_parser(name, help=help, description=help, epilog=_EXAMPLES[name])
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--output", metavar="FILE", help="append JSON lines here, not to stdout")
    parser.add_argument(
        "--keep", action="store_true", help="leave lines where octavo plan --price finds them, too"
    )
    parser.add_argument("--workload-seed", type=int, default=seed, metavar="INT", help=seed_help)
    return parser


def _add_lengths(parser: Parser, input_len: int, output_len: int) -> None:
    for flag, default, what in (
        ("--input-len", input_len, "prompt"),
        ("--output-len", output_len, "output"),
    ):
        parser.add_argument(
            flag,
            type=parse_lengths,
            default=Lengths(low=default, high=default),
            metavar="N|LOW:HIGH",
            help=f"{what} tokens of a request (default: {default})",
        )


def _add_repeat(parser: Parser, default: int) -> None:
    parser.add_argument(
        "--repeat",
        type=positive,
        default=default,
        metavar="INT",
        help=f"runs, of which the median counts (default: {default})",
    )


def _add_offline(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model to load in this process")
    parser.add_argument("--text", metavar="FILE", help="cut prompts from this text, not at random")
    parser.add_argument(
        "--peer", choices=("transformers",), help="run the same in transformers, print the ratio"
    )
    add_options(parser, EngineConfig)


def _add_latency(benches: Subparsers) -> None:
    parser = _new(benches, "latency", "time of one batch: first token, each token, rates")
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="INT", help="requests (default: 1)"
    )
    _add_lengths(parser, 128, 128)
    _add_repeat(parser, 3)
    _add_offline(parser)


def _add_throughput(benches: Subparsers) -> None:
    parser = _new(benches, "throughput", "rate of many requests that are there at once")
    parser.add_argument(
        "--num-prompts", type=positive, default=64, metavar="INT", help="requests (default: 64)"
    )
    _add_lengths(parser, 128, 128)
    parser.set_defaults(repeat=1)
    _add_offline(parser)


def _add_serve(benches: Subparsers) -> None:
    help = "load on a running server, through its OpenAI API"
    seed_help = "same prompts in every run (default: new prompts of the same lengths in each)"
    parser = _new(benches, "serve", help, seed=None, seed_help=seed_help)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    add("--api-key", metavar="TEXT", help="key that the server wants")
    add(
        "--served-model",
        "--model",
        dest="served_model",
        metavar="TEXT",
        help="model name; the server's first if not given",
    )
    for flags, what in (
        (("--num-prompts",), "requests (default: 64, or waves x concurrency)"),
        (
            ("--concurrency", "--max-concurrency"),
            "requests that are open at once; the next one comes when one ends",
        ),
    ):
        add(*flags, dest=flags[0][2:].replace("-", "_"), type=positive, metavar="INT", help=what)
    add("--waves", type=positive, default=4, metavar="INT", help="requests a stream (default: 4)")
    add("--clients", type=positive, default=1, metavar="INT", help="client processes (default: 1)")
    add("--request-rate", type=float, metavar="FLOAT", help="requests per second; all at once if 0")
    add("--vocab-size", type=positive, default=8192, metavar="INT", help="ids drawn (default 8192)")
    add("--temperature", type=float, default=0.0, metavar="FLOAT", help="of sampling (default: 0)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make every answer as long as --output-len (default: on)",
    )
    add(
        "--goodput",
        type=parse_goodput,
        action="append",
        default=[],
        metavar="GOAL:MS",
        help="count requests within ttft:MS, tpot:MS or e2e:MS (repeat for several)",
    )
    _add_lengths(parser, 128, 128)


def _add_compare(benches: Subparsers) -> None:
    help = "two OpenAI-compatible servers on the same requests in turn: ratios and their spread"
    parser = _new(benches, "compare", help)
    add = parser.add_argument
    for flag, what in (
        ("--url", "of a server: give two"),
        ("--api-key", "key that the servers want; given twice, one each"),
        ("--served-model", "model name, or one each; a server's first if not given"),
    ):
        metavar = "URL" if flag == "--url" else "TEXT"
        add(flag, action="append", default=[], metavar=metavar, help=what)
    for flag, default, what in (
        ("--rounds", 5, "times that both get the same requests"),
        ("--num-prompts", 16, "requests a round"),
        ("--concurrency", 4, "requests that are open at once"),
    ):
        shown = f"{what} (default: {default})"
        add(flag, type=positive, default=default, metavar="INT", help=shown)
    add("--temperature", type=float, default=0.0, metavar="FLOAT", help="of sampling (default: 0)")
    add(
        "--ignore-eos",
        action="store_true",
        help="make answers equally long, where both servers know the field ignore_eos",
    )
    _add_lengths(parser, 128, 64)


def _add_prefix(benches: Subparsers) -> None:
    parser = _new(benches, "prefix", "cold against cached prefixes, and what finding them costs")
    for flag, default, help in (
        ("--prefix-len", 1024, "tokens of the shared prefix"),
        ("--requests", 16, "requests that share a prefix at once"),
        ("--lookup-len", 131072, "tokens of the prompt that is looked up"),
        (
            "--long-len",
            1048576,
            "tokens of the context that bookkeeping is measured at",
        ),
        ("--sequences", 256, "running sequences of the scheduler"),
    ):
        shown = f"{help} (default: {default})"
        parser.add_argument(flag, type=positive, default=default, metavar="INT", help=shown)
    _add_repeat(parser, 5)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="without it only the bookkeeping is measured"
    )
    parser.set_defaults(text=None)
    add_options(parser, EngineConfig)


def _add_workloads(benches: Subparsers) -> None:
    parser = _new(benches, "workloads", "named workloads with floors, and a peer's figures")
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(MODELS)} (random weights), or any model")
    add(
        "--only",
        type=parse_names,
        metavar="NAME,NAME",
        help=f"of {','.join(NAMES)} (default: all but L128)",
    )
    add("--quick", action="store_true", help="tiny sizes: the same code in seconds")
    add("--layers", type=positive, metavar="INT", help="cut a named shape to so many layers")
    add_options(parser, EngineConfig)
