"""Where a runner's steps are done, one after the other: a thread of its own, or its caller's.

Owned by the model runner. A lane knows nothing of steps. What work raises is its future's, never
the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Lane(Protocol):
    """Does work in the order in which it is given."""

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Has `work` done after all that was given before."""
        ...

    def reclaim(self) -> None:
        """Gives memory back that the allocator keeps for later."""
        ...

    def is_usable(self) -> bool:
        """Returns whether the device still works after an error; waits for what it has to do."""
        ...

    def close(self) -> None:
        """Drops work that has not begun and waits for what has."""
        ...


class ThreadLane:
    """A thread that computes: whoever gives it work goes on at once."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="octavo-runner")

    def do(self, work: Callable[[], T]) -> Future[T]:
        return self._worker.submit(work)

    def reclaim(self) -> None: ...

    def is_usable(self) -> bool:
        return True

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)


class CallerLane:
    """The caller's own thread: for work that only enqueues, where another thread would be a detour
    (and, in tests through Triton's interpreter, for work that computes)."""

    def do(self, work: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    def reclaim(self) -> None: ...

    def is_usable(self) -> bool:
        return True

    def close(self) -> None: ...


class CUDALane(CallerLane):
    """The caller's thread, which launches on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reclaim(self) -> None:
        torch.cuda.empty_cache()

    def is_usable(self) -> bool:
        """Some errors of a kernel (an illegal address, a failed assertion) end the process's
        context for good: everything raises from then on."""
        for _ in range(2):  # the first may only repeat what has been raised
            with suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
                return True
        return False

    def close(self) -> None:
        torch.cuda.synchronize(self._device)


def make_lane(device: torch.device) -> Lane:
    """Returns the lane of a device whose kernels are launched, not called."""
    return CUDALane(device) if device.type == "cuda" else CallerLane()
