"""Parts of a page that are made: what stands between `<!-- NAME ARGUMENTS -->` and its end.

Used by the make_*.py beside it; the end of a block is `<!-- end of NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

Maker = Callable[[list[str]], str]
"""Gets a block's arguments, returns what stands in it."""

_BLOCK = re.compile(
    r"(?P<begin><!-- (?P<name>\w+)(?P<arguments>(?:\s[^>]*?)?) -->\n).*?"
    r"(?P<end><!-- end of (?P=name) -->)",
    re.DOTALL,
)


def filled(text: str, makers: Mapping[str, Maker]) -> str:
    """Returns a page with the blocks that `makers` knows made anew."""

    def block(found: re.Match[str]) -> str:
        maker = makers.get(found["name"])
        if maker is None:
            return found[0]
        return f"{found['begin']}{maker(found['arguments'].split())}\n{found['end']}"

    return _BLOCK.sub(block, text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines
    )
