"""Owns where a JSON value ends in text that comes in pieces.

Used by the grammars of calls. Finds the end and the first thing that cannot be JSON; never makes
objects, so that arguments go on as they were written.
"""

from __future__ import annotations

import re

from octavo.tools.marks import MARKS
from octavo.tools.source import Emit, Source, Step

_PLAIN = re.compile(r"[\s\w+\-.,:]+")
"""What stands outside of strings beside brackets; digits and words are not looked at closer."""
_SCALAR = re.compile(r"[\w+\-.]+")
_INSIDE = re.compile(rf'[^"\\{MARKS}]+')
_PAIRS = {"{": "}", "[": "]"}
_OPENERS = '{["'


class JsonScanner:
    """One value, character by character. `is_whole` or `is_broken` once it has ended."""

    __slots__ = ("_closers", "_has_begun", "_is_escaped", "_is_inside", "is_broken", "is_whole")

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._has_begun = self._is_inside = self._is_escaped = False
        self.is_whole = self.is_broken = False

    def feed(self, text: str) -> int:
        """Returns how many characters of `text` belong to the value."""
        at = 0
        while at < len(text) and not (self.is_whole or self.is_broken):
            at = self._in_string(text, at) if self._is_inside else self._outside(text, at)
        return at

    def _in_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _INSIDE.match(text, at)
        if found is not None:
            return found.end()
        if text[at] == "\\":
            self._is_escaped = True
        elif text[at] == '"':
            self._is_inside = False
            self.is_whole = not self._closers
        else:
            self.is_broken = True
            return at
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        char = text[at]
        is_first, self._has_begun = not self._has_begun, True
        if not self._closers and (not is_first or char not in _OPENERS):  # a number or a word
            found = _SCALAR.match(text, at)
            if found is None:
                self.is_whole, self.is_broken = not is_first, is_first
                return at
            return found.end()
        if char == '"':
            self._is_inside = True
        elif char in _PAIRS:
            self._closers.append(_PAIRS[char])
        elif char == self._closers[-1]:
            self._closers.pop()
            self.is_whole = not self._closers
        else:
            found = _PLAIN.match(text, at)
            self.is_broken = found is None
            return at if found is None else found.end()
        return at + 1

    def end(self) -> None:
        """The text has ended."""
        is_scalar = self._has_begun and not self._closers and not self._is_inside
        self.is_whole = self.is_whole or is_scalar
        self.is_broken = not self.is_whole


def pass_value(source: Source, emit: Emit) -> Step[bool]:
    """Gives `emit` one JSON value as it comes; returns whether it was whole.

    If it is broken, what could be JSON has been emitted, and the rest is still to be read.
    """
    yield from source.skip_space()
    scanner = JsonScanner()
    while (yield from source.more()):
        num = scanner.feed(source.rest)
        if num:
            emit(source.take(num))
        if scanner.is_whole or scanner.is_broken:
            return scanner.is_whole
    scanner.end()
    return scanner.is_whole
