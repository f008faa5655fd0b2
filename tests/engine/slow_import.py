"""A module that is imported for ever, as a heavy one seems to be."""

from __future__ import annotations

import time

time.sleep(3600)


def main() -> int:
    """Never reached."""
    return 0
