"""Runs `octavo` and notes where its main thread spends CPU time, at little cost to what it does.

    python benchmarks/front_sampler.py REPORT serve MODEL [options]

Run by serving_suite.py for the front process of a server. SIGUSR2 begins the sampling and, sent
again, ends it and writes REPORT, a JSON object of functions, lines and the share of samples that
were in them.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from octavo.cli import main

INTERVAL_SECONDS = 0.001
"""Of CPU time."""
NUM_SHOWN = 45


class Sampler:
    """Counts what the main thread is in, once in each interval of the process's CPU time."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._is_on = False
        self._num_samples = 0
        self._lines: Counter[str] = Counter()
        self._functions: Counter[str] = Counter()
        self._inclusive: Counter[str] = Counter()

    def toggle(self, number: int, frame: FrameType | None) -> None:
        self._is_on = not self._is_on
        seconds = INTERVAL_SECONDS if self._is_on else 0.0
        signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
        if not self._is_on:
            self._write()

    def sample(self, number: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self._num_samples += 1
        self._lines[f"{_name(frame)}:{frame.f_lineno}"] += 1
        self._functions[_name(frame)] += 1
        names: set[str] = set()
        at: FrameType | None = frame
        while at is not None:
            names.add(_name(at))
            at = at.f_back
        self._inclusive.update(names)

    def _write(self) -> None:
        tables = {
            "self": self._functions,
            "inclusive": self._inclusive,
            "lines": self._lines,
        }
        total = max(self._num_samples, 1)
        shares = {
            title: {name: round(count / total, 4) for name, count in table.most_common(NUM_SHOWN)}
            for title, table in tables.items()
        }
        self._report.write_text(json.dumps({"num_samples": self._num_samples, **shares}))


def _name(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name} {frame.f_code.co_qualname}"


if __name__ == "__main__":
    sampler = Sampler(Path(sys.argv[1]))
    signal.signal(signal.SIGUSR2, sampler.toggle)
    signal.signal(signal.SIGPROF, sampler.sample)
    sys.exit(main(sys.argv[2:]))
