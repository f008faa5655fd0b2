"""What a server costs its host: seconds until it is ready, and the memory of all its processes.

    python benchmarks/footprint.py MODEL [--streams 16 --input-len 128 --output-len 128]
        [--starts 3] [server and engine options]

Memory is what a machine would have to have for this server alone: a page that several of its
processes map counts once, and whole if others map it too. The peak is that of the whole run, from
the start to the end of the load; what lies where is read at the end of the load. Beside the seconds
of a start stand those of `import torch` alone, just before. Linux only: it reads /proc. One JSON
object a start.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from process_figures import children_of

RUN_OCTAVO = "import sys; from octavo.cli import main; sys.exit(main())"
READY_SECONDS = 240.0
PERIOD_SECONDS = 0.05
LARGE_BYTES = 8 << 20
"""An anonymous mapping of so many is called by itself: a KV cache, weights that were made."""
MIB = 1 << 20


class Mapping(NamedTuple):
    """One of a process: its file or the kernel's word for it, where in the file, and its bytes."""

    name: str
    offset: str
    size: int
    own: int
    """The share of this process in what belongs to no file."""
    file: int
    """Pages of the file that are there."""


def anonymous_bytes(pid: int) -> int:
    """Returns 0 for a process that has gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        fields = dict(line.split()[:2] for line in lines[1:])
        return 1024 * (int(fields["Pss_Anon:"]) + int(fields["Pss_Shmem:"]))
    return 0


def mappings(pid: int) -> Iterator[Mapping]:
    text = Path(f"/proc/{pid}/smaps").read_text()
    for one in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]:
        head, _, rest = one.partition("\n")
        _, _, offset, _, _, *name = head.split(None, 5)
        bytes_of = {
            words[0]: int(words[1]) * 1024
            for words in map(str.split, rest.splitlines())
            if words[-1] == "kB"
        }
        own = bytes_of["Anonymous:"] and round(
            bytes_of["Pss:"] * bytes_of["Anonymous:"] / bytes_of["Rss:"]
        )
        file = bytes_of["Rss:"] - bytes_of["Anonymous:"]
        yield Mapping("".join(name), offset, bytes_of["Size:"], own, file)


def kind_of(mapping: Mapping) -> str:
    if mapping.name.startswith("["):
        return mapping.name.strip("[]")
    if not mapping.name:
        return "large pieces" if mapping.size >= LARGE_BYTES else "small pieces"
    path = Path(mapping.name)
    if ".so" in path.name:
        return path.name.split(".")[0] if "torch" in path.name else "other libraries"
    return "weights" if path.suffix in (".gguf", ".safetensors") else "other files"


def where_it_lies(pids: Sequence[int]) -> tuple[int, list[dict[str, int]]]:
    """Returns the bytes of files that processes map, each page once, and of each process all its
    bytes by kind."""
    files: dict[tuple[str, str], int] = {}
    kinds: list[dict[str, int]] = []
    for pid in pids:
        found: Counter[str] = Counter()
        for one in mappings(pid):
            found[kind_of(one)] += one.own + one.file
            place = one.name, one.offset
            files[place] = max(files.get(place, 0), one.file)
        kinds.append(dict(found.most_common()))
    return sum(files.values()), kinds


class Watch:
    """The most that belongs to no file, of a process and those that it started."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(PERIOD_SECONDS):
            with suppress(OSError):
                pids = (self._pid, *children_of(self._pid))
                self.peak = max(self.peak, sum(map(anonymous_bytes, pids)))


def name_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    modules = [word for word in words if word.startswith("octavo.")]
    return modules[-1].removeprefix("octavo.") if modules else "front"


def await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url + "/ready", timeout=5):
            return
        time.sleep(0.01)
    raise SystemExit("the server did not start")


def seconds_of(*command: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def measure(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """Starts a server, loads it, and returns the figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", RUN_OCTAVO, "serve", args.model, "--port", str(port)]
    torch_seconds = seconds_of("-c", "import torch")
    began = time.monotonic()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        with Watch(process.pid) as watch:
            await_ready(url, process)
            start_seconds = time.monotonic() - began
            if args.streams:
                load(url, args)
            pids = (process.pid, *children_of(process.pid))
            files, kinds = where_it_lies(pids)
        return {
            "import_torch_seconds": round(torch_seconds, 2),
            "start_seconds": round(start_seconds, 2),
            "peak_mib": round((watch.peak + files) / MIB),
            "files_mib": round(files / MIB),
            "where_mib": {
                name_of(pid): {kind: round(size / MIB, 1) for kind, size in found.items()}
                for pid, found in zip(pids, kinds, strict=True)
            },
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def load(url: str, args: argparse.Namespace) -> None:
    command = ["-c", RUN_OCTAVO, "bench", "serve", "--url", url, "--concurrency", str(args.streams)]
    command += ["--waves", "1", "--input-len", str(args.input_len)]
    command += ["--output-len", str(args.output_len), "--output", "/dev/null"]
    seconds_of(*command)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=16, help="0: only the start")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--starts", type=int, default=1)
    args, options = parser.parse_known_args()
    for _ in range(args.starts):
        print(json.dumps(measure(args, options)), flush=True)


if __name__ == "__main__":
    main()
