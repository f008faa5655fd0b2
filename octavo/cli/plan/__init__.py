"""`octavo plan`: what goes where in memory and what fits, before anything is loaded.

Called by the command line. Reads the config (and the header of a GGUF file), never a weight; the
plan itself is the engine's own (`engine.memory`).
"""

from __future__ import annotations

import argparse
import json

from octavo.cli.options import Subparsers, add_options, engine_config, parse_size
from octavo.cli.plan.costs import WORKLOADS, parse_price, parse_workloads
from octavo.cli.plan.planner import Planner, read_model
from octavo.cli.plan.pricing import machine_name, price_plans
from octavo.cli.plan.pricing_text import pricing_json, pricing_text
from octavo.cli.plan.text import (
    as_json,
    changes_text,
    device_text,
    layout_text,
    parts_text,
    plan_text,
    products_text,
)
from octavo.cli.serve import add_model
from octavo.config import EngineConfig
from octavo.device import DeviceMemory, select_device

HELP = "show weights, KV cache and what fits, from the config alone"
EXAMPLES = """examples:
  octavo plan demo-moe                                     on this machine
  octavo plan MODEL --device cuda --memory 80GiB           on a GPU of 80 GiB, here or not
  octavo plan MODEL --device cuda --memory 80GiB --tensor-parallel-size 2
  octavo plan MODEL --device cuda --memory 80GiB --price 3.0 --max-model-len 40K"""
LENGTHS = (1024, 4096, 16384, 65536, 131072)


def add_parser(subparsers: Subparsers) -> None:
    """Adds `plan`."""
    parser = subparsers.add_parser("plan", help=HELP, description=HELP, epilog=EXAMPLES)
    add_model(parser)
    add = parser.add_argument
    add(
        "--memory",
        "--gpu-memory",
        dest="memory",
        type=parse_size,
        metavar="SIZE",
        help="plan for this much free memory, like 80GiB (default: this machine's); with --device "
        "cuda for a card of that size, which need not be here",
    )
    add(
        "--lengths",
        type=_parse_numbers,
        default=LENGTHS,
        metavar="N,N",
        help="say how many requests of these lengths fit",
    )
    add(
        "--price",
        type=parse_price,
        metavar="DOLLARS",
        help="dollars an hour and GPU: say what a million tokens cost, and what would change it",
    )
    add(
        "--workloads",
        type=parse_workloads,
        default=WORKLOADS,
        metavar="IN:OUT,...",
        help="what --price counts: tokens of prompt and output, or of prompt, its cached part and "
        "output (default: 1000:300, 32000:30000:400, 8000:300, 500:4000)",
    )
    add(
        "--measured",
        action="append",
        default=[],
        metavar="FILE",
        help="lines of octavo bench (--output) that --price uses; those of --keep if not given",
    )
    add("--json", action="store_true", help="print one JSON object")
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises CapacityError, after what is known, if the model does not fit."""
    config = engine_config(args)
    spec, family, files = read_model(config)
    device, memory = _device(config.device, args.memory)
    planner = Planner(spec, family, files, device, memory)
    parts = planner.parts(config)
    if not args.json:
        print(parts_text(config.model, spec, parts))
    plan = planner.plan(config)
    changes = planner.changes(config, plan)
    layout = planner.experts_layout(config)
    pricing = None
    if args.price is not None:
        pricing = price_plans(
            planner,
            config,
            plan,
            price=args.price,
            workloads=args.workloads,
            machine=machine_name(device, args.memory),
            measured=args.measured,
        )
    if args.json:
        costs = {} if pricing is None else {"costs": pricing_json(pricing)}
        print(json.dumps(as_json(spec, parts, plan, changes, args.lengths, layout) | costs))
    else:
        print(device_text(device, args.memory))
        if device == "cpu":
            print(products_text(config))
        print(plan_text(plan, args.lengths))
        if layout is not None:
            print(layout_text(layout, config))
        print(changes_text(changes))
        if pricing is not None:
            print(pricing_text(pricing))
    return 0


def _device(name: str, size: int | None) -> tuple[str, DeviceMemory]:
    """Returns the name and the memory of the device to plan for: of one with `size` bytes, all of
    them free, if that is given, else of this machine's."""
    if size is None:
        device = select_device(name)
        return device.name, device.memory()
    name = select_device(name).name if name == "auto" else name
    return name, DeviceMemory(total_bytes=size, available_bytes=size)


def _parse_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(n) if n.strip().isdigit() else 0 for n in text.split(","))
    if not all(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths; write it like 1024,8192")
    return numbers
