"""Kernels built side by side, none of them run; and who is told of builds.

Used by the runner; `launchable.py` asks it before a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

from octavo.kernels.triton.launching.chip import is_known_triton
from octavo.observe.progress import UNWATCHED, Progress

asked: ContextVar[set[tuple[Any, ...]] | None] = ContextVar("asked", default=None)
"""Within `building`: what was asked for already."""
watching: ContextVar[Progress] = ContextVar("watching", default=UNWATCHED)


def can_build() -> bool:
    """Whether `building` is possible here: the interpreter builds nothing, and another Triton may
    do it in another way."""
    return is_known_triton() and not triton.knobs.runtime.interpret


@contextmanager
def building(num_threads: int) -> Iterator[None]:
    """Has launches made inside build their kernels, on `num_threads` threads, and run none: what
    they would have written stays as it was. Ends when all are built.

    Most of a build is not Python, so that threads suffice. What cannot be built is asked for again
    by the launch that needs it, which then raises.
    """
    assert can_build()
    token = asked.set(set())
    try:
        with (
            ThreadPoolExecutor(num_threads) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        asked.reset(token)


def is_building() -> bool:
    """Whether this is within `building`."""
    return asked.get() is not None


def tell_builds(progress: Progress) -> None:
    """From now on `progress` is told of launches in this thread that may have to build first."""
    watching.set(progress)
