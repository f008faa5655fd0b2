"""What the machine has: memory, cores, and how much of it this process uses.

Asked by the engine's loader, `octavo plan` and the runner's builder. Holds no state, and imports
torch only once a GPU's driver is there; outside `runner/` no other file says torch.cuda.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.errors import ConfigError

_UNLIMITED = 2**60
"""cgroup v1 writes a number near 2^63 where there is no limit."""
_DRIVER_FILES = ("dev/nvidiactl", "dev/kfd", "dev/dxg")
"""One of them is there where a GPU driver is: NVIDIA's, AMD's, or either one's under WSL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of the memory that weights and KV cache live in."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProcesses:
    """Who else holds memory of the device."""

    count: int | None
    """None where the driver does not name them, as in many containers."""
    used_bytes: int


class Device(Protocol):
    """What computes, and its memory."""

    name: str
    torch_name: str
    """What torch calls it: "cpu", "cuda:0"."""

    def memory(self) -> DeviceMemory:
        """Returns the memory there is, and what of it can be had now."""
        ...

    def num_cores(self) -> int:
        """Returns the CPU cores that this process may use."""
        ...

    def other_processes(self) -> OtherProcesses | None:
        """Returns who else uses the memory, None where that is the whole machine. Slow."""
        ...


class CPUDevice:
    """The host, seen through /proc and the cgroup that holds this process (v1 or v2)."""

    name = "cpu"
    torch_name = "cpu"

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
        """Returns the most memory this process has used so far."""
        return _fields(self._proc / "self" / "status")["VmHWM"] * 1024

    def other_processes(self) -> OtherProcesses | None:
        return None

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


class GPUProbe(Protocol):
    """What torch and the driver say about GPUs; tests answer in their place."""

    def wanted_version(self) -> str | None:
        """Returns the CUDA or ROCm version that torch was built for, None for a CPU build."""
        ...

    def driver_version(self) -> int:
        """Returns the newest CUDA version that the driver knows, as 12040 for 12.4, or 0."""
        ...

    def is_usable(self) -> bool: ...

    def num_devices(self) -> int: ...

    def memory(self, index: int) -> tuple[int, int]:
        """Returns (free, total) bytes."""
        ...

    def own_bytes(self, index: int) -> int:
        """Returns what torch holds in this process, without the driver's context."""
        ...

    def processes(self, index: int) -> str:
        """Returns lines of `pid, MiB` from nvidia-smi, empty if it does not answer."""
        ...


class TorchProbe:
    """The GPUs of this machine. Every method imports torch."""

    def wanted_version(self) -> str | None:
        import torch

        return torch.version.cuda or torch.version.hip

    def driver_version(self) -> int:
        import torch

        # Not public, and the one way to ask without starting a device that cannot start.
        return torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]

    def is_usable(self) -> bool:
        import torch

        with warnings.catch_warnings():
            # torch warns of an old driver here; `gpu_problem` makes an error of it.
            warnings.simplefilter("ignore")
            return torch.cuda.is_available()

    def num_devices(self) -> int:
        import torch

        return torch.cuda.device_count()

    def memory(self, index: int) -> tuple[int, int]:
        import torch

        return torch.cuda.mem_get_info(index)

    def own_bytes(self, index: int) -> int:
        import torch

        return torch.cuda.memory_reserved(index)

    def processes(self, index: int) -> str:
        import torch

        # By its UUID: nvidia-smi does not heed CUDA_VISIBLE_DEVICES and may count otherwise.
        name = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        wanted = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--id={name}", *wanted],
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout


class CUDADevice:
    """One GPU that torch reaches as "cuda"; the cores are the host's."""

    name = "cuda"

    def __init__(self, index: int = 0, *, probe: GPUProbe, root: Path = Path("/")) -> None:
        self.torch_name = f"cuda:{index}"
        self._index = index
        self._probe = probe
        self._host = CPUDevice(root)

    def memory(self) -> DeviceMemory:
        free, total = self._probe.memory(self._index)
        return DeviceMemory(total_bytes=total, available_bytes=free)

    def num_cores(self) -> int:
        return self._host.num_cores()

    def other_processes(self) -> OtherProcesses:
        """Returns who else uses the card; takes up to 5 seconds.

        In a container the driver may name nobody, or us by the host's number: then what is in use
        and not torch's is reported, our own context included.
        """
        memory = self.memory()
        lines = self._probe.processes(self._index).splitlines()
        mib = dict([part.strip() for part in line.split(",")] for line in lines if "," in line)
        count = len(mib) - 1 if mib else None
        is_ours_known = mib.pop(str(os.getpid()), None) is not None
        used = memory.total_bytes - memory.available_bytes - self._probe.own_bytes(self._index)
        if is_ours_known and all(size.isdigit() for size in mib.values()):
            used = sum(int(size) for size in mib.values()) * 2**20
        return OtherProcesses(count=count, used_bytes=max(used, 0))


def return_free_memory() -> None:
    """Gives the system back what the C allocator keeps of free memory, where it can be asked to
    (glibc): loading leaves tens of megabytes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def select_device(
    name: str, index: int = 0, *, probe: GPUProbe | None = None, root: Path = Path("/")
) -> Device:
    """Returns the device called `name`; "auto" is a GPU where one is usable, else the CPU.

    `index` counts GPUs: each tensor parallel rank has its own. Raises ConfigError that says why
    there is no GPU if one is asked for, or how many there are if they do not suffice.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"device {name!r} is unknown; use auto, cuda or cpu", field="device")
    probe = probe or TorchProbe()
    problem = "" if name == "cpu" else gpu_problem(probe, root)
    if name == "cuda" and problem:
        raise ConfigError(f"device cuda cannot be used: {problem}", field="device")
    if name == "cpu" or problem:
        return CPUDevice(root)
    if index >= probe.num_devices():
        raise ConfigError(
            f"tensor_parallel_size times data_parallel_size needs {index + 1} GPUs or more, "
            f"{probe.num_devices()} are there; let it be at most {probe.num_devices()}",
            field="tensor_parallel_size",
        )
    return CUDADevice(index, probe=probe, root=root)


def gpu_problem(probe: GPUProbe, root: Path) -> str:
    """Returns why no GPU can be used and the way out, "" if one can.

    Looks for a driver first, so that a machine without a GPU does not import torch for this.
    """
    if not any((root / file).exists() for file in _DRIVER_FILES):
        return (
            "no GPU driver was found (there is neither /dev/nvidiactl nor /dev/kfd); install it, "
            "or give the container access to the GPU, or use --device cpu"
        )
    wanted = probe.wanted_version()
    if wanted is None:
        return "the installed torch is a CPU build; install one for the GPU, or use --device cpu"
    if probe.is_usable():
        return ""
    known = probe.driver_version()
    if 0 < known < int(wanted.split(".")[0]) * 1000:
        return (
            f"the driver{_driver_release(root)} is too old: it knows CUDA up to {known // 1000}."
            f"{known % 1000 // 10}, and this torch wants {wanted}; update the driver, install a "
            "torch for that CUDA, or use --device cpu"
        )
    if probe.num_devices() == 0:
        return "no GPU is visible to this process; check CUDA_VISIBLE_DEVICES, or use --device cpu"
    return "torch cannot start a GPU that the driver shows; try nvidia-smi, or use --device cpu"


def _driver_release(root: Path) -> str:
    """Returns the version of NVIDIA's driver as " 535.104.05", or "" where it is not told."""
    for word in _text(root / "proc" / "driver" / "nvidia" / "version").split():
        if word.replace(".", "").isdigit() and "." in word:
            return f" {word}"
    return ""


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
