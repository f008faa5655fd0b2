"""An engine process whose steps do what a request's seed says: for tests of its watchers.

Run in place of `octavo.engine.process` when `octavo.engine.spawn.ENGINE_MODULE` names it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

from octavo.engine import process
from octavo.engine.core import EngineCore
from octavo.request import Request

SPIN, HOLD, CRASH, LEAVE, SLOW = range(1001, 1006)
"""Seeds: hang in Python, hang with the interpreter held, die of a signal, of an exit, be slow."""


def main(*arguments: str) -> int:
    """Runs the engine process with an ear for these seeds."""
    add = EngineCore.add

    def add_listening(core: EngineCore, request: Request) -> None:
        add(core, request)
        seed = request.params.seed
        if seed == SPIN:
            while True:
                time.sleep(0.01)
        if seed == HOLD:
            ctypes.PyDLL(None).sleep(3600)
        if seed == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        if seed == LEAVE:
            os._exit(7)
        if seed == SLOW:
            decoder = core._runner.decoder  # type: ignore[attr-defined]
            beat = decoder.progress.beat
            # Every layer takes a while, and the steps of a request far longer than is allowed.
            type(decoder.progress).beat = lambda progress: (time.sleep(0.3), beat())  # type: ignore[method-assign]

    EngineCore.add = add_listening  # type: ignore[method-assign]
    return process.main(*arguments)
