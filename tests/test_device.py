"""The host's memory and cores, from a made-up /proc and /sys; GPUs, from made-up answers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.device import (
    CPUDevice,
    CUDADevice,
    OtherProcesses,
    return_free_memory,
    select_device,
)
from octavo.errors import ConfigError
from tests.gpu_probe import Probe
from tests.weights.reading import anonymous_bytes

MIB, GIB = 2**20, 2**30


def make_root(root: Path, files: dict[str, str]) -> CPUDevice:
    meminfo = "MemTotal:    8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\nHugePages: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return CPUDevice(root)


def test_without_a_cgroup_the_memory_is_the_machines(tmp_path: Path) -> None:
    memory = make_root(tmp_path, {}).memory()
    assert (memory.total_bytes, memory.available_bytes) == (8192 * MIB, 4096 * MIB)


def test_a_cgroup_v2_limit_of_a_parent_counts_and_file_pages_are_not_used(tmp_path: Path) -> None:
    top, own = "sys/fs/cgroup/service", "sys/fs/cgroup/service/engine"
    files = {
        "proc/self/cgroup": "0::/service/engine\n",
        f"{own}/memory.max": "max\n",
        f"{own}/memory.current": f"{100 * MIB}\n",
        f"{top}/memory.max": f"{1024 * MIB}\n",
        f"{top}/memory.current": f"{600 * MIB}\n",
        f"{top}/memory.stat": f"anon 5\ninactive_file {200 * MIB}\n",
        f"{top}/cpu.max": "100000 100000\n",
    }
    device = make_root(tmp_path, files)
    memory = device.memory()
    assert (memory.total_bytes, memory.available_bytes) == (1024 * MIB, 624 * MIB)
    assert device.num_cores() == 1


def test_a_cgroup_v1_limit_counts_where_the_container_sees_only_the_mount(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        f"{mount}/memory.limit_in_bytes": f"{2048 * MIB}\n",
        f"{mount}/memory.usage_in_bytes": f"{48 * MIB}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    device = make_root(tmp_path, files)
    memory = device.memory()
    assert (memory.total_bytes, memory.available_bytes) == (2048 * MIB, 2000 * MIB)
    assert device.num_cores() == len(os.sched_getaffinity(0))


def test_a_v1_group_without_a_limit_is_not_one_of_nine_exabytes(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "9223372036854771000\n",
    }
    assert make_root(tmp_path, files).memory().available_bytes == 4096 * MIB


def test_this_machine_has_memory_cores_and_a_peak() -> None:
    device = CPUDevice()
    memory = device.memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 1 <= device.num_cores() <= (os.cpu_count() or 1)
    assert MIB < device.peak_memory_bytes() < memory.total_bytes


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'tpu' is unknown; use auto, cuda or cpu"):
        select_device("tpu")


@pytest.fixture
def gpu_root(tmp_path: Path) -> Path:
    """A root with NVIDIA's driver."""
    for name, text in {
        "dev/nvidiactl": "",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05 "
        " Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.2.0 (Debian)\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_usable_gpu_is_what_auto_means(gpu_root: Path) -> None:
    device = select_device("auto", probe=Probe(), root=gpu_root)
    assert (device.name, device.torch_name) == ("cuda", "cuda:0")
    memory = device.memory()
    assert (memory.total_bytes, memory.available_bytes) == (80 * GIB, 70 * GIB)
    assert select_device("cpu", probe=Probe(), root=gpu_root).torch_name == "cpu"


def test_every_rank_has_a_gpu_of_its_own(gpu_root: Path) -> None:
    probe = Probe(devices=2)
    assert select_device("auto", 1, probe=probe, root=gpu_root).torch_name == "cuda:1"
    with pytest.raises(ConfigError, match="needs 3 GPUs or more, 2 are there") as caught:
        select_device("cuda", 2, probe=probe, root=gpu_root)
    assert caught.value.field == "tensor_parallel_size"


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (Probe(wanted=None, usable=False), "the installed torch is a CPU build"),
        (
            Probe(driver=12040, usable=False),
            r"driver 535.104.05 is too old: it knows CUDA up to 12.4, and this torch wants 13.0",
        ),
        (Probe(usable=False, devices=0), "no GPU is visible.*CUDA_VISIBLE_DEVICES"),
        (Probe(usable=False), "torch cannot start a GPU"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why_and_auto_does_without(
    probe: Probe, reason: str, gpu_root: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*--device cpu") as caught:
        select_device("cuda", probe=probe, root=gpu_root)
    assert caught.value.field == "device"
    assert select_device("auto", probe=probe, root=gpu_root).name == "cpu"


def test_without_a_driver_nobody_asks_torch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no GPU driver was found.*--device cpu"):
        select_device("cuda", root=tmp_path)
    program = (
        "import sys, pathlib, octavo.device\n"
        f"octavo.device.select_device('auto', root=pathlib.Path({str(tmp_path)!r}))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("listed", "others"),
    [
        ("own, 6500\n1, 2048\n22, 1024\n", OtherProcesses(count=2, used_bytes=3 * GIB)),
        ("own, 6500\n", OtherProcesses(count=0, used_bytes=0)),
        ("own, [N/A]\n1, [N/A]\n", OtherProcesses(count=1, used_bytes=4 * GIB)),
        # A container's numbers are not the host's: one of these is us.
        ("1, 2048\n22, 6500\n", OtherProcesses(count=1, used_bytes=4 * GIB)),
        ("", OtherProcesses(count=None, used_bytes=4 * GIB)),
    ],
)
def test_others_on_the_gpu_are_counted_without_us(listed: str, others: OtherProcesses) -> None:
    probe = Probe(listed=listed.replace("own", str(os.getpid())))
    assert CUDADevice(probe=probe).other_processes() == others


def test_the_whole_host_has_no_others() -> None:
    assert CPUDevice().other_processes() is None


def test_memory_that_the_allocator_keeps_goes_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 << 10, 1024
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last keeps the heap from shrinking by itself
        libc.free(block)
    before = anonymous_bytes()
    return_free_memory()
    after = anonymous_bytes()
    libc.free(blocks[-1])
    assert before - after > size * count // 2
