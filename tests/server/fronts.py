"""`octavo serve` with several front processes, from its command line to its end."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


COMMAND = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]


OPTIONS = "--load-format=dummy --dtype=float32 --num-threads=1 --kv-cache-memory=16MiB --port=0"


class Fronts:
    """A server of several front processes, from its command line to its end."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", str(model), *OPTIONS.split(), *options],
                cwd=ROOT,
                stderr=file,
            )

    @functools.cached_property
    def url(self) -> str:
        """Where it serves; waits until it does."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"is served on (\S+)", self.log.read_text())
            if found:
                return found[1]
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def children(self, module: str) -> list[int]:
        """Process ids of the children that run a module."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    command = (folder / "cmdline").read_bytes().split(b"\0")
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:
                    continue
                if parent == str(self.process.pid) and module.encode() in command:
                    found.append(int(folder.name))
        return found

    def end(self) -> int:
        """Waits for the end; returns the exit code, and asserts that nobody is left."""
        code = self.process.wait(timeout=60)
        modules = ("octavo.server.front_process", "octavo.engine.process")
        assert not [pid for module in modules for pid in self.children(module)]
        assert "Traceback" not in self.log.read_text()
        return code
