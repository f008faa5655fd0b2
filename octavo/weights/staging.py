"""Memory between files and a device, a thread's own.

Made by placements, handed to sources. Never knows what the bytes mean.
"""

from __future__ import annotations

from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

STAGING_BYTES = 1 << 25


class Readable(Protocol):
    """A file."""

    def read_into(self, start: int, out: Tensor) -> None:
        """Fills `out` (uint8, host) from byte `start` on."""
        ...


class Staging:
    """Memory that one thread reads file bytes into on their way to a device.

    Page-locked, so that the device fetches from it while the thread goes on.
    """

    def __init__(self, device: torch.device, converting: Lock | None = None) -> None:
        """`converting`: held by whoever makes planes of what has arrived; one for all threads, so
        that what this takes for a moment is taken once."""
        is_host = device.type == "cpu"
        self.device = device
        self.converting = converting or Lock()
        self._bytes = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=not is_host)
        self._fetched = None if is_host else torch.Event(device=device)

    def take(self) -> Tensor:
        """Returns the memory, uint8, once the device has fetched what it held."""
        if self._fetched is not None:
            self._fetched.synchronize()  # sync: the next bytes overwrite the last
        return self._bytes

    def sent(self) -> None:
        """Remembers that copies out of the memory were enqueued on the device's current stream."""
        if self._fetched is not None:
            self._fetched.record(torch.accelerator.current_stream(self.device))

    def fetch(self, file: Readable, start: int, length: int) -> Tensor:
        """Returns bytes of a file on the device, uint8 [length]; they may still be on their way."""
        out = torch.empty(length, dtype=torch.uint8, device=self.device)
        for piece in out.split(STAGING_BYTES):
            data = self.take()[: len(piece)]
            file.read_into(start, data)
            piece.copy_(data, non_blocking=True)
            self.sent()
            start += len(piece)
        return out
