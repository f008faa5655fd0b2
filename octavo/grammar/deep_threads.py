"""Threads in which a library may recurse as deep as any text that is taken makes it.

Used for compiling: definitions that refer to each other in a chain of thousands would overflow an
ordinary thread's stack, and end the process with it. Of the room only what is used takes memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

STACK_BYTES = 256 * 2**20
_START = threading.Lock()

P = ParamSpec("P")
T = TypeVar("T")


class DeepThreads:
    """Up to `num_threads` of them, started as they are needed."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a call in one of the threads."""
        # A thread has the size that is set when it is started, which the pool does in here.
        with _START:
            before = threading.stack_size(STACK_BYTES)
            try:
                return self._pool.submit(call, *args, **kwargs)
            finally:
                threading.stack_size(before)

    def close(self) -> None:
        """Lets go of the threads; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
