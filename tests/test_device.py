"""The host's memory and cores, with and without cgroup limits, from a made-up /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.device import CPUDevice, select_device
from octavo.errors import ConfigError

MIB = 2**20


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
    device = select_device("auto")
    memory = device.memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 1 <= device.num_cores() <= (os.cpu_count() or 1)
    assert MIB < device.peak_memory_bytes() < memory.total_bytes


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'tpu' is unknown; use auto or cpu"):
        select_device("tpu")
