"""What tenants have used, in memory that all front processes of a server share.

Made by `fronts` (or by the app of a server of one process), used by `budgets`. A table of counters
by tenant; whoever changes one holds the lock of the file, for microseconds. It lasts as long as the
server.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

NUM_SLOTS = 8192
PROBES = 32
"""Slots in which a tenant may lie; if all are taken, the one unused longest is given up."""
NUM_METERS = 3
_SLOT = struct.Struct(f"16s{2 * NUM_METERS}dqd")


class Usage:
    """One tenant's counters, read and written under the lock."""

    __slots__ = ("key", "meters", "num_open", "touched_at")

    def __init__(self, key: bytes, values: tuple[float, ...] = ()) -> None:
        self.key = key
        numbers = values or (0.0,) * (2 * NUM_METERS + 2)
        self.meters = [list(numbers[i : i + 2]) for i in range(0, 2 * NUM_METERS, 2)]
        """Of each: what is used, and when that was so (seconds of `monotonic`)."""
        self.num_open = int(numbers[-2])
        self.touched_at = numbers[-1]


class SharedCounts:
    """The table."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Opens the memory of that descriptor, which is another process's; or makes its own."""
        size = NUM_SLOTS * _SLOT.size
        if descriptor is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                descriptor = os.dup(file.fileno())
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, size)

    @contextmanager
    def usage(self, tenant: str, now: float) -> Iterator[Usage]:
        """A tenant's counters, which are written back at the end."""
        key = hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            place, usage = self._find(key)
            yield usage
            used = [number for meter in usage.meters for number in meter]
            _SLOT.pack_into(self._memory, place, key, *used, usage.num_open, now)
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def _find(self, key: bytes) -> tuple[int, Usage]:
        """Returns where a tenant's counters are, or are to be, and what they are."""
        first, oldest = int.from_bytes(key[:4], "little"), (float("inf"), 0)
        for probe in range(PROBES):
            place = (first + probe) % NUM_SLOTS * _SLOT.size
            known, *numbers = _SLOT.unpack_from(self._memory, place)
            if known == key:
                return place, Usage(key, tuple(numbers))
            if known == bytes(16):
                return place, Usage(key)
            is_busy = numbers[-2] > 0
            oldest = min(oldest, (float("inf") if is_busy else numbers[-1], place))
        return oldest[1], Usage(key)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)
