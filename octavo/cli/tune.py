"""`octavo tune`: measures launch shapes for a model on this GPU and keeps those that are faster.

Called by the command line. Reads the config, never a weight; measuring is `kernels.triton.tuning`.
The engine finds what is kept by itself, and needs none of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from octavo.cli.bench.shapes import MODELS, engine_values
from octavo.cli.options import Subparsers, add_options, config_values
from octavo.cli.plan.planner import read_model
from octavo.config import EngineConfig, tuned_dir
from octavo.device import select_device
from octavo.errors import ConfigError
from octavo.folders import CACHE_WAY_OUT, check_writable, temporary_folder
from octavo.models.spec import LayerSpec, MLPSpec, ModelSpec, MoESpec

if TYPE_CHECKING:  # they import torch
    from octavo.kernels.triton.tuning.shapes import Shape
    from octavo.kernels.triton.tuning.tune import Found, Measure

HELP = "measure launch shapes on this GPU and keep those that beat the built-in ones"
EXAMPLES = """examples:
  octavo tune MODEL                            measure, and keep what is fastest"""
OPTIONS = (
    *("revision", "download_dir", "dtype", "load_format", "tensor_parallel_size"),
    *("deterministic", "device"),
)
DECODES = (1, 32, 8, 64, 128, 256)
"""Tokens of the steps that pay most, first come first measured."""
PREFILLS = (8192, 2048)
REST = (16, 512, 1024, 4096, 4, 2)
SKINNY = 64
"""Above, dense products are cuBLAS's, but for a few."""
BUILDERS = 8
"""Kernels that are built at once, at most."""
MAX_SAMPLES = 256
"""Rows of logits, as `max_num_seqs` is set by default."""


class Problem(NamedTuple):
    """One product of `num_tokens`, or one layer of experts."""

    kind: Literal["dense", "moe"]
    num_tokens: int
    sizes: tuple[int, ...]
    """Rows and columns, or top_k, experts, inner and hidden size."""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `tune`."""
    parser = subparsers.add_parser("tune", help=HELP, description=HELP, epilog=EXAMPLES)
    known = ", ".join(MODELS)
    what = f"any model, of which only the config is read, or {known}"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument(
        "--seconds",
        type=float,
        default=55.0,
        metavar="FLOAT",
        help="begin no new shape after so long (default: %(default)s)",
    )
    add_options(parser, EngineConfig, only=OPTIONS)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace, measure: Measure | None = None) -> int:
    """Tunes the model's shapes, most valuable first. Without `measure`, raises ConfigError where
    there is no GPU."""
    began = time.monotonic()
    with temporary_folder() as folder:
        given = config_values(args, EngineConfig)
        values = engine_values(args.model, given, Path(folder), None)
        config = EngineConfig(**values).resolve()
        device = select_device(config.device)
        if device.name == "cpu" and measure is None:
            raise ConfigError(
                "launch shapes exist only for GPUs, and here the CPU computes; there is nothing to "
                "tune",
                field="device",
            )
        spec, _, files = read_model(config)
    from octavo.engine.memory import weights_dtype
    from octavo.kernels.triton.tuning.shapes import save_shape, shapes_path
    from octavo.kernels.triton.tuning.tune import Tuner

    tuner = Tuner(
        device.torch_name,
        weights_dtype(config, files.config),
        is_deterministic=config.deterministic,
        measure=measure,
        num_threads=1 if device.name == "cpu" else min(device.num_cores(), BUILDERS),
    )
    path = shapes_path(Path(tuned_dir()), tuner.device)
    check_writable(path.parent, CACHE_WAY_OUT)  # before minutes of measuring
    problems = problems_of(spec.of_rank(config.tensor_parallel_size), config.deterministic)
    print(f"{'shape':<44}{'tried':>6}{'heuristic us':>13}{'best us':>10}{'gain':>8}", flush=True)
    num_kept = num_done = 0
    fates = Counter[str]()
    for problem in problems:
        if time.monotonic() - began > args.seconds:
            break
        found = tuner.tune(problem, lambda: time.monotonic() - began > args.seconds)
        save_shape(path, found.key, found.shape)
        print(_row(found), flush=True)
        fates += found.fates
        num_done += 1
        num_kept += found.shape is not None
    print(f"{num_kept} of {num_done} shapes are faster than the heuristic; kept in {path}")
    print("candidates: " + ", ".join(f"{count} {fate}" for fate, count in fates.items()))
    if num_done < len(problems):
        left = f"{len(problems) - num_done} shapes of less weight were not reached"
        print(f"{left} in {args.seconds:g} s: built kernels are kept, so run it again for more")
    return 0


def problems_of(spec: ModelSpec, is_deterministic: bool) -> list[Problem]:
    """Returns what a step of the model multiplies, by value: experts before dense products, decode
    steps before prefills."""
    head = (spec.lm_head_rows or spec.vocab_size, spec.hidden_size)
    experts = dict.fromkeys(
        (mlp.top_k, mlp.num_experts, mlp.expert_size, spec.hidden_size)
        for mlp in (layer.mlp for layer in spec.layers)
        if isinstance(mlp, MoESpec)
    )
    dense = dict.fromkeys(
        sizes for layer in spec.layers for sizes in _dense_sizes(layer, spec.hidden_size)
    )
    problems: list[Problem] = []
    for group in (DECODES, PREFILLS, REST):
        problems += [Problem("moe", n, sizes) for n in group for sizes in experts]
        for n in group:
            rows_of_head = () if n > MAX_SAMPLES else (head,)
            for sizes in dict.fromkeys((*dense, *rows_of_head)):
                if n <= SKINNY or is_deterministic or sizes[0] % 8 or sizes == head:
                    problems.append(Problem("dense", n, sizes))
    return problems


def _dense_sizes(layer: LayerSpec, hidden: int) -> Iterator[tuple[int, ...]]:
    """Yields rows and columns of a layer's products; gate and up are one, as what makes q, k and v
    is."""
    attention, mlp = layer.attention, layer.mlp
    yield from attention.products(hidden)
    inner = mlp.size if isinstance(mlp, MLPSpec) else mlp.shared_size
    if inner:
        yield 2 * inner, hidden
        yield hidden, inner
    if isinstance(mlp, MoESpec):
        yield mlp.num_experts, hidden


def _row(found: Found) -> str:
    name = " ".join(map(str, found.key)).replace("torch.", "")
    row = f"{name:<44}{found.fates.total():>6}{found.heuristic_us:>13.2f}{found.best_us:>10.2f}"
    row += f"{found.heuristic_us / found.best_us - 1:>8.1%}"
    if found.shape is not None:
        before, after = (_numbers(shape) for shape in (found.heuristic, found.shape))
        changes = [f"{name} {n}->{after[name]}" for name, n in before.items() if n != after[name]]
        row += "  " + ", ".join(changes)
    return row


def _numbers(shape: Shape) -> dict[str, int]:
    """Returns the numbers of a launch shape and of its parts by name."""
    found: dict[str, int] = {}
    for name, value in dataclasses.asdict(shape).items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{part}".strip("."): number for part, number in parts.items()}
    return found
