"""What the front sees of the engine process without asking it: beats, and stacks.

Made by the client, which reads; the engine process attaches by descriptors and writes. Memory and a
file that have no name, so that nothing of them stays however either process ends. Never waits.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from octavo.observe.progress import Progress

STACK_SIGNAL = signal.SIGUSR2
"""Has the engine process write the stacks of its threads, even while one holds the interpreter."""
_BEATS, _BUILDING = 0, 1
_MAX_STACK_BYTES = 64 * 2**10


class Reading(NamedTuple):
    """One look at an engine."""

    beats: int
    is_building: bool


class Vitals(Progress):
    """Numbers in shared memory and a file for stacks, both inherited by descriptor."""

    def __init__(self, beats: int, stacks: int) -> None:
        """Takes over two descriptors."""
        self._descriptors = beats, stacks
        self._memory = mmap.mmap(beats, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls) -> Vitals:
        """Returns new ones with nothing in them. Raises OSError."""
        with tempfile.TemporaryFile() as beats, tempfile.TemporaryFile() as stacks:
            beats.truncate(mmap.PAGESIZE)
            return cls(os.dup(beats.fileno()), os.dup(stacks.fileno()))

    @property
    def descriptors(self) -> tuple[int, int]:
        """What the engine process inherits and attaches to."""
        return self._descriptors

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    # -- the engine's side ---------------------------------------------------------------------

    def beat(self) -> None:
        # Two threads may beat at once; that the number changes is all that counts.
        self._words[_BEATS] += 1

    @contextmanager
    def building(self) -> Iterator[None]:
        self.beat()
        self._words[_BUILDING] = 1
        try:
            yield
        finally:
            self._words[_BUILDING] = 0
            self.beat()

    def catch_stacks(self) -> None:
        """From now on crashes of this process and STACK_SIGNAL leave their stacks here."""
        file = self._descriptors[1]
        faulthandler.enable(file)
        faulthandler.register(STACK_SIGNAL, file, all_threads=True)

    # -- the front's side ----------------------------------------------------------------------

    def read(self) -> Reading:
        return Reading(self._words[_BEATS], bool(self._words[_BUILDING]))

    def stacks(self) -> str:
        """Returns what was written so far; empty if nothing was."""
        data = os.pread(self._descriptors[1], _MAX_STACK_BYTES, 0)
        return data.decode(errors="replace").strip()
