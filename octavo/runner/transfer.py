"""Moves a step's small arrays between host and device without stopping either.

Owned by the model runner. One stream computes, one brings the next step's inputs, one takes
results to the host: inputs do not wait for the results of the step before. On a CPU (tests through
Triton's interpreter) the same face copies memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.step import Int32

RING_SLOTS = 12
"""Uploads under way at once: two steps of up to four each, and room."""
_SMALLEST = 1 << 14


class Download(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[NDArray]:
        """Returns them once they have arrived."""
        ...


class Transfer(Protocol):
    """Both directions, and the stream that computes."""

    def follow(self) -> None:
        """Has steps begin after all that the caller has launched so far: memory that a runner is
        made of is filled on the caller's stream."""
        ...

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is launched inside runs on the compute stream, after the uploads made inside."""
        ...

    def upload(self, packed: Int32) -> Tensor:
        """Returns `packed` on the device, to be read by this step alone."""
        ...

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Starts to copy results of the step to the host."""
        ...


@dataclass(frozen=True, slots=True)
class _Arrived:
    arrays: list[NDArray]

    def wait(self) -> list[NDArray]:
        return self.arrays


class HostTransfer:
    """Transfer for a device that is the host."""

    def follow(self) -> None: ...

    @contextmanager
    def step(self) -> Iterator[None]:
        yield

    def upload(self, packed: Int32) -> Tensor:
        return torch.from_numpy(packed.copy())

    def download(self, tensors: Sequence[Tensor]) -> Download:
        return _Arrived([tensor.numpy().copy() for tensor in tensors])


@dataclass(slots=True)
class _Slot:
    pinned: Tensor
    device: Tensor
    uploaded: torch.cuda.Event
    read: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class _UnderWay:
    hosts: list[Tensor]
    sources: list[Tensor]
    """Kept until the copy has run: their memory must not be handed out again."""
    arrived: torch.cuda.Event

    def wait(self) -> list[NDArray]:
        self.arrived.synchronize()
        return [host.numpy() for host in self.hosts]


class CUDATransfer:
    """Transfer over pinned memory and three streams."""

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device = device
        self._compute = torch.cuda.Stream(device)
        self._uploads = torch.cuda.Stream(device)
        self._downloads = torch.cuda.Stream(device)
        self._slots = [self._make_slot(max(largest, _SMALLEST)) for _ in range(RING_SLOTS)]
        self._next = 0
        self._used: list[_Slot] = []

    def _make_slot(self, size: int) -> _Slot:
        return _Slot(
            pinned=torch.empty(size, dtype=torch.int32, pin_memory=True),
            device=torch.empty(size, dtype=torch.int32, device=self._device),
            uploaded=torch.cuda.Event(),
            read=torch.cuda.Event(),
        )

    def follow(self) -> None:
        self._compute.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def step(self) -> Iterator[None]:
        with torch.cuda.stream(self._compute):
            try:
                yield
            finally:
                for slot in self._used:
                    slot.read.record(self._compute)
                self._used.clear()

    def upload(self, packed: Int32) -> Tensor:
        slot = self._slots[self._next]
        slot.uploaded.synchronize()
        if len(packed) > len(slot.pinned):
            slot.read.synchronize()
            slot = self._slots[self._next] = self._make_slot(2 * len(packed))
            # Its memory may be what a kernel still under way has been using.
            slot.read.record(self._compute)
        self._next = (self._next + 1) % RING_SLOTS
        slot.pinned.numpy()[: len(packed)] = packed
        there = slot.device[: len(packed)]
        self._uploads.wait_event(slot.read)
        with torch.cuda.stream(self._uploads):
            there.copy_(slot.pinned[: len(packed)], non_blocking=True)
            slot.uploaded.record(self._uploads)
        self._compute.wait_event(slot.uploaded)
        self._used.append(slot)
        return there

    def download(self, tensors: Sequence[Tensor]) -> Download:
        computed = torch.cuda.Event()
        computed.record(self._compute)
        self._downloads.wait_event(computed)
        hosts = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
        with torch.cuda.stream(self._downloads):
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._downloads)
        return _UnderWay(hosts, list(tensors), arrived)


def make_transfer(device: torch.device, largest: int = 0) -> Transfer:
    """Returns the transfer that suits `device`. `largest`: numbers of the largest upload that is
    expected; a larger one has to wait for memory, which takes the time of many uploads."""
    return CUDATransfer(device, largest) if device.type == "cuda" else HostTransfer()


def pack(parts: Sequence[NDArray]) -> tuple[Int32, list[slice]]:
    """Returns int32 arrays in one, each at a multiple of 16 bytes, and where each one lies.

    Triton builds a kernel anew for pointers that are not so aligned.
    """
    places: list[slice] = []
    at = 0
    for part in parts:
        places.append(slice(at, at + len(part)))
        at += -(-len(part) // 4) * 4
    packed = np.empty(at, np.int32)
    for place, part in zip(places, parts, strict=True):
        packed[place] = part
    return packed, places
