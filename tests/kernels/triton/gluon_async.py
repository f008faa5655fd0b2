"""Copies of Hopper's tensor memory engine, barriers in shared memory, and warps that do different
work, for kernels of `gluon_cpu.py`: each of them a thread here, which waits as its warps would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.triton.gluon_values import Machine, Shared, data_of

SECONDS = 30.0
"""That a thread waits at most: a kernel that would hang fails."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A tensor that is copied in boxes, zeros where they reach beyond it."""

    tensor: Tensor
    box: list[int]
    layout: object = None

    @property
    def dtype(self) -> Any:
        return Shared(self.tensor).dtype

    @property
    def block_shape(self) -> list[int]:
        return self.box

    @classmethod
    def from_tensor(cls, tensor: Tensor, box: list[int], layout: object) -> Descriptor:
        return cls(tensor, box)


@dataclass(slots=True)
class _Barrier:
    count: int
    phase: int = 0
    arrived: int = 0
    awaited_bytes: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)
    """Of copies that come late: made by whoever waits for them."""

    def step(self) -> None:
        if self.arrived == self.count and self.awaited_bytes == 0:
            self.phase, self.arrived = self.phase + 1, 0


class Barriers:
    """Stands for `mbarrier` and `tma`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._changed = threading.Condition()
        self._known: dict[int, _Barrier] = {}

    def MBarrierLayout(self) -> None: ...  # noqa: N802 (Gluon's name)

    def init(self, at: Shared, count: int) -> None:
        self._known[at.data.data_ptr()] = _Barrier(int(count))

    def _of(self, at: Shared) -> _Barrier:
        return self._known[at.data.data_ptr()]

    def _arrive(self, at: Shared, more_bytes: int) -> None:
        with self._changed:
            barrier = self._of(at)
            barrier.arrived += 1
            barrier.awaited_bytes += more_bytes
            assert barrier.arrived <= barrier.count, "more arrive than are counted"
            barrier.step()
            self._changed.notify_all()

    def arrive(self, at: Shared) -> None:
        self._arrive(at, 0)

    def expect(self, at: Shared, more_bytes: Any) -> None:
        self._arrive(at, int(more_bytes))

    def wait(self, at: Shared, parity: Any) -> None:
        barrier, parity = self._of(at), int(data_of(parity))
        with self._changed:
            while barrier.phase & 1 == parity:
                if barrier.copies:
                    barrier.copies.pop(0)()
                else:
                    assert self._changed.wait(SECONDS), "a wait without an end"

    def async_copy_global_to_shared(
        self, source: Descriptor, at: list[Any], barrier_at: Shared, to: Shared
    ) -> None:
        barrier = self._of(barrier_at)

        def now() -> None:
            first = [int(data_of(one)) for one in at]
            box = torch.zeros(source.box).to(source.tensor.dtype)
            begun = zip(first, source.box, strict=True)
            some = source.tensor[tuple(slice(one, one + n) for one, n in begun)]
            box[tuple(slice(0, n) for n in some.shape)] = some
            assert list(box.shape) == to.shape
            to.data.copy_(box)
            barrier.awaited_bytes -= box.numel() * box.element_size()
            barrier.step()
            self._changed.notify_all()

        with self._changed:
            if self._machine.is_late:
                barrier.copies.append(now)
                self._changed.notify_all()
            else:
                now()


def warp_specialize(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: object, registers: object
) -> None:
    """Runs the parts of a program side by side; raises what one of them raises."""
    failures: list[BaseException] = []

    def run(part: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            part(*arguments)
        except BaseException as error:
            failures.append(error)  # Told where the kernel was launched.

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert failures or not thread.is_alive(), "a part of a program without an end"
    if failures:
        raise failures[0]
