"""`octavo serve` as processes that a test looks at from outside, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.engine.processes import await_end

ROOT = Path(__file__).parents[2]


OPTIONS = "--port 0 --load-format dummy --device cpu --num-threads 1 --kv-cache-memory 16MiB"


MAX_SECONDS = 40.0
"""For what takes seconds, on machines that do much else."""


class Serve:
    """One `octavo serve` with a folder for temporary files of its own."""

    def __init__(self, model: Path, folder: Path, *more: str, is_read: bool = True) -> None:
        self.temporary = Path(tempfile.mkdtemp(dir=folder))
        start = "import sys; from octavo.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "serve", str(model), *OPTIONS.split(), *more],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.children: set[int] = set()
        self._reader = threading.Thread(target=self._read)
        if is_read:
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def await_that(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + MAX_SECONDS
        while not what():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def await_url(self) -> str:
        self.await_that(lambda: " is served on " in self.text)
        self.find_children()
        return next(word for word in self.text.split() if word.startswith("http://"))

    def find_children(self) -> set[int]:
        pid = self.process.pid
        path = Path(f"/proc/{pid}/task/{pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            self.children |= {int(child) for child in path.read_text().split()}
        return self.children

    @property
    def engine(self) -> int:
        (engine,) = self.find_children()
        return engine

    def end(self) -> int:
        """Returns the exit code after looking at what is left."""
        code = self.process.wait(MAX_SECONDS)
        for child in self.children:
            await_end(child)
        if self._reader.ident is not None:
            self._reader.join(MAX_SECONDS)
        assert "Traceback" not in self.text, self.text
        assert list(self.temporary.iterdir()) == []
        return code


StartServe = Callable[..., Serve]
