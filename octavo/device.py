"""What the machine has: memory, cores, and how much of it this process uses.

Asked by the planner and the runner's builder. Holds no state and imports no torch; later devices
join here, so that no other file says torch.cuda.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.errors import ConfigError

_UNLIMITED = 2**60
"""cgroup v1 writes a number near 2^63 where there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of the memory that weights and KV cache live in."""

    total_bytes: int
    available_bytes: int


class Device(Protocol):
    """What computes, and its memory."""

    name: str

    def memory(self) -> DeviceMemory:
        """Returns the memory there is, and what of it can be had now."""
        ...

    def num_cores(self) -> int:
        """Returns the CPU cores that this process may use."""
        ...

    def peak_memory_bytes(self) -> int:
        """Returns the most memory this process has used so far."""
        ...


class CPUDevice:
    """The host, seen through /proc and the cgroup that holds this process (v1 or v2)."""

    name = "cpu"

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._cgroups = root / "sys" / "fs" / "cgroup"

    def memory(self) -> DeviceMemory:
        fields = _fields(self._proc / "meminfo")
        total, available = fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024
        for limit, used in self._memory_limits():
            total = min(total, limit)
            available = min(available, max(limit - used, 0))
        return DeviceMemory(total_bytes=total, available_bytes=available)

    def num_cores(self) -> int:
        cores = len(os.sched_getaffinity(0))
        for folder in self._folders("cpu"):
            quota = _cpu_quota(folder)
            if quota is not None:
                cores = min(cores, max(1, round(quota)))
        return cores

    def peak_memory_bytes(self) -> int:
        return _fields(self._proc / "self" / "status")["VmHWM"] * 1024

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        """Yields (limit, bytes used beyond droppable file pages) of every cgroup above us."""
        for folder in self._folders("memory"):
            for limit_name, used_name, cache_name in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                limit = _number(folder / limit_name)
                used = _number(folder / used_name)
                if limit is not None and used is not None and limit < _UNLIMITED:
                    yield limit, used - _fields(folder / "memory.stat").get(cache_name, 0)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yields our cgroup's folder and those above it, up to the mount; a container may see only
        the mount itself."""
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = self._cgroups / controller if controllers else self._cgroups
            folder = mount / path.lstrip("/")
            yield folder
            while folder != mount and mount in folder.parents:
                folder = folder.parent
                yield folder


def select_device(name: str) -> Device:
    """Returns the device called `name`, or the best one for "auto". Raises ConfigError."""
    if name not in ("auto", "cpu"):
        raise ConfigError(f"device {name!r} is unknown; use auto or cpu", field="device")
    return CPUDevice()


def _text(path: Path) -> str:
    """A missing file is an empty one: not every kernel and container shows every file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Reads lines of `name: number unit` or `name number`."""
    parts = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {part[0]: int(part[1]) for part in parts if len(part) > 1 and part[1].isdigit()}


def _cpu_quota(folder: Path) -> float | None:
    """Returns the cores' worth of time that a cgroup gets, None without a limit."""
    quota = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us").strip(),
        _text(folder / "cpu.cfs_period_us").strip(),
    ]
    if len(quota) != 2 or not all(part.isdigit() for part in quota):
        return None
    return int(quota[0]) / int(quota[1])
