"""Writes the table of weight formats into docs/checkpoints.md: `python -m docs.make_cells`."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.kernels.cells import table

PAGE = Path(__file__).parent / "checkpoints.md"
_MARKS = re.compile(r"(<!-- cells -->\n).*?(<!-- end of cells -->)", re.DOTALL)


def page(text: str) -> str:
    """Returns the page with the table between its marks as the code has it."""
    made, count = _MARKS.subn(lambda found: f"{found[1]}{table()}\n{found[2]}", text)
    assert count == 1, "docs/checkpoints.md has no marks for the table of cells"
    return made


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
