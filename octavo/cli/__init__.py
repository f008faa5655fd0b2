"""The command `octavo`.

`main` is called by the console script. Imports next to nothing, so that it is in charge of Ctrl-C
before anything else is imported; the commands are in `commands`.
"""

from __future__ import annotations

import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 for Ctrl-C."""
    # While the commands are imported there is nothing to end well: no traceback, the process goes.
    before = _on_interrupt(signal.SIG_DFL)
    try:
        from octavo.cli.commands import parse, run

        args = parse(sys.argv[1:] if argv is None else argv)
    finally:
        _on_interrupt(before)
    return run(args)


def _on_interrupt(handler: object) -> object:
    """Returns the handler before; None in a thread, which has no say in this."""
    if handler is None:
        return None
    try:
        return signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    except ValueError:
        return None
