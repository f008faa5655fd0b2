"""What a benchmark writes: one JSON line a result, and for the person a progress bar and a table.

Called by every benchmark. The line goes to a file, or to stdout unless that is a terminal, and
everything else to stderr, so that a pipe sees JSON alone. Never measures anything itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo import __version__
from octavo.config import bench_dir
from octavo.device import CPUDevice
from octavo.errors import ConfigError

Scalar = float | int | str | bool | None
Value = Scalar | Mapping[str, Scalar] | Sequence[Scalar] | Sequence[Mapping[str, Scalar]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where results go. `output` is a file that lines are appended to, or None for stdout."""

    bench: str
    settings: Mapping[str, Value]
    output: str | None = None
    computes_on: str = "cpu"
    """Name of the device that computes."""
    is_kept: bool = False
    """Whether lines are left where `octavo plan --price` finds them, too."""

    def add(
        self,
        name: str,
        figures: Mapping[str, Value],
        show: Callable[[str, Mapping[str, Value]], None] | None = None,
    ) -> None:
        """Writes one result: a JSON line, and a table, which `show` prints if it is given."""
        line = json.dumps(
            {
                "bench": self.bench,
                "name": name,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "device": device() | {"computes_on": self.computes_on},
                "settings": dict(self.settings),
                "figures": {key: _rounded(value) for key, value in figures.items()},
            }
        )
        if self.output is not None:
            _append("--output", self.output, line)
        elif not sys.stdout.isatty():  # a person reads the table
            print(line, flush=True)
        if self.is_kept:
            os.makedirs(bench_dir(), exist_ok=True)
            _append("--keep", os.path.join(bench_dir(), f"{self.bench}.jsonl"), line)
        (show or _print_table)(f"{self.bench}: {name}", figures)


def _append(option: str, path: str, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from error


def settings_of(args: argparse.Namespace) -> dict[str, Value]:
    """Returns what was asked for, as far as it is not secret or a function."""
    hidden = {"run", "parser", "command", "bench", "output", "keep", "api_key", "verdicts"}
    return {
        name: value if isinstance(value, (int, float, bool)) or value is None else str(value)
        for name, value in vars(args).items()
        if name not in hidden
    }


def versions() -> dict[str, str]:
    """Returns the versions that a figure depends on, of what is installed."""
    found = {"octavo": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> dict[str, Value]:
    """Returns the machine: processor, cores, instruction sets that matter, memory."""
    info: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", "").split())
    wanted = ("avx2", "f16c", "avx512f", "avx512_bf16", "amx_bf16")
    cpu = CPUDevice()
    return {
        "kind": cpu.name,
        "name": info.get("model name", platform.processor() or platform.machine()),
        "cores": cpu.num_cores(),
        "isa": " ".join(flag for flag in wanted if flag in flags),
        "memory_bytes": cpu.memory().total_bytes,
    }


def percentiles(name: str, seconds: Sequence[float], points: Sequence[int]) -> dict[str, Value]:
    """Returns mean and percentiles of times as `<name>_mean_ms`, `<name>_p50_ms`, ...

    A percentile is the smallest value that at least that share of the values do not exceed.
    """
    if not seconds:
        return {}
    ordered = sorted(seconds)
    figures: dict[str, Value] = {f"{name}_mean_ms": 1e3 * sum(ordered) / len(ordered)}
    for point in points:
        index = max(-(-point * len(ordered) // 100), 1) - 1
        figures[f"{name}_p{point}_ms"] = 1e3 * ordered[index]
    return figures


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr; the value is called with the number of things just done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def _print_table(title: str, figures: Mapping[str, Value]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for key, value in figures.items():
        table.add_row(key, _shown(key, value))
    Console(stderr=True).print(table)


def _shown(key: str, value: Value) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_shown(key, part) for part in value)
    if isinstance(value, Mapping):
        return "\n" + "  ".join(_shown(name, part) for name, part in value.items())
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _rounded(value: Value) -> Any:
    """Six significant digits: more would pretend to a precision that no timing has."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
