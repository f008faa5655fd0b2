"""What Linux tells of running processes: CPU time, resident memory, descendants.

Read by serving_suite.py. Never changes a process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


class PeakMemory:
    """The most that a process's resident memory grew by inside the block."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = resident_bytes(pid)
        self._peak = self.before

    @property
    def growth(self) -> int:
        return self._peak - self.before

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self._peak = max(self._peak, resident_bytes(self._pid))


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(stat: Path) -> float:
    """Returns user and system time of a process or thread."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECONDS


def cpu_times(pid: int) -> tuple[float, float]:
    """Returns user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) * TICK_SECONDS, int(fields[12]) * TICK_SECONDS


def children_of(pid: int) -> list[int]:
    """Returns all descendants."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [one for child in children for one in children_of(child)]
