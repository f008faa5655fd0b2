"""The command `octavo`.

`main` is called by the console script. Imports next to nothing, so that it is in charge of Ctrl-C
before anything else is imported; the commands are in `commands`. A server's engine process begins
here: what it imports takes longest, and options are read meanwhile.
"""

from __future__ import annotations

import gc
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.engine.spawn import HeadStart


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 for Ctrl-C."""
    # While the commands are imported there is nothing to end well: no traceback, the process goes.
    before, is_collected = _on_interrupt(signal.SIG_DFL), gc.isenabled()
    words = sys.argv[1:] if argv is None else argv
    gc.disable()  # What is imported stays.
    begun = None
    try:
        begun = _head_start(words)
        from octavo.cli.commands import parse, run

        args = parse(words)
    except BaseException:
        if begun is not None:
            begun.end()
        raise
    finally:
        _on_interrupt(before)
        if is_collected:
            gc.enable()
    if begun is not None:
        args.begun = begun
    return run(args)


def _head_start(words: Sequence[str]) -> HeadStart | None:
    """Starts the engine process of a server whose options are still to be read."""
    if words[:1] != ["serve"] or not {"-h", "--help"}.isdisjoint(words):
        return None
    from octavo.engine.spawn import HeadStart

    return HeadStart()


def _on_interrupt(handler: object) -> object:
    """Returns the handler before; None in a thread, which has no say in this."""
    if handler is None:
        return None
    try:
        return signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:
        return None
