"""SIGINT and SIGTERM, from the first moment of a process to its last.

Installed by the `serve` command before it imports anything; whoever runs listens. Imports nothing
heavy.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = signal.SIGUSR1
"""The machine is about to be taken away."""
_AT_ONCE = 3
"""Whoever sends so many will not wait for anything."""


class StopSignals:
    """Tells a listener of every signal. Without one there is nothing to end well: the process goes.

    The third signal ends the process wherever it is; children see the end of their parent.
    """

    def __init__(self) -> None:
        self.num_received = 0
        self.first = signal.SIGTERM
        self._listener: Callable[[], object] | None = None
        self._on_notice: Callable[[], object] | None = None
        self._has_notice = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(NOTICE, self._handle_notice)

    def listen(self, listener: Callable[[], object]) -> None:
        """From now on `listener` is called in the main thread for every signal."""
        self._listener = listener

    def take_over(self, listener: Callable[[], object]) -> None:
        """As `listen`, and calls `listener` for those that have come already: whoever listened
        before may have had no more use for them."""
        self._listener = listener
        for _ in range(self.num_received):
            listener()

    def listen_to_notice(self, listener: Callable[[], object]) -> None:
        """`listener` is called in the main thread when the machine is about to go, at once if it is
        known already."""
        self._on_notice = listener
        if self._has_notice:
            listener()

    def _handle_notice(self, number: int, frame: FrameType | None) -> None:
        self._has_notice = True
        if self._on_notice is not None:
            self._on_notice()

    @property
    def exit_code(self) -> int:
        """Of a server that was stopped before it served: a supervisor that sent SIGTERM has what it
        wanted, a person at a terminal sees that it was Ctrl-C."""
        return 130 if self.first == signal.SIGINT else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.num_received:
            self.first = signal.Signals(number)
        self.num_received += 1
        if self._listener is None or self.num_received >= _AT_ONCE:
            os._exit(self.exit_code if self._listener is None else 1)
        self._listener()
