"""Owns text that is still coming: grammars written as generators read it and wait for more.

Used by the grammars of this package. Never knows what the text means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

Step = Generator[None, None, T]
"""A grammar: yields when it needs more text, returns what it has read."""
Emit = Callable[[str], None]


class BrokenCallError(Exception):
    """What looked like a call is none; raised before anything was told of it."""


class Markers:
    """Texts that are looked for, any of them, wherever the text that comes is cut."""

    __slots__ = ("_firsts", "_longest", "_pattern", "_prefixes", "texts")

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(sorted({text for text in texts if text}, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None
        self._prefixes = {text[:n] for text in self.texts for n in range(1, len(text))}
        self._firsts = {text[0] for text in self.texts if len(text) > 1}
        self._longest = max(map(len, self.texts), default=0)

    def __contains__(self, text: object) -> bool:
        return text in self.texts

    def search(self, text: str) -> re.Match[str] | None:
        """Returns the first marker in `text`; of several that begin there the longest."""
        return None if self._pattern is None else self._pattern.search(text)

    def match(self, text: str) -> str:
        """Returns the longest marker that `text` begins with, or ""."""
        found = None if self._pattern is None else self._pattern.match(text)
        return "" if found is None else found[0]

    def num_held(self, text: str) -> int:
        """Returns how many of the last characters could be the beginning of a marker."""
        tail = text[1 - self._longest :] if self._longest > 1 else ""
        if not any(first in tail for first in self._firsts):
            return 0
        return next((n for n in range(len(tail), 0, -1) if tail[-n:] in self._prefixes), 0)

    def may_begin(self, text: str) -> bool:
        """Whether all of `text` could be the beginning of a longer marker."""
        return not text or text in self._prefixes


class Source:
    """What has come and is not read yet, and what may have to be read again."""

    __slots__ = ("_at", "_kept", "_text", "is_cut", "is_ended")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: int | None = None
        self.is_ended = False
        self.is_cut = False
        """Whether it ended because there was no room for more."""

    def feed(self, text: str) -> None:
        start = self._at if self._kept is None else self._kept
        self._text = self._text[start:] + text
        self._at -= start
        self._kept = None if self._kept is None else 0

    def end(self, *, is_cut: bool) -> None:
        self.is_ended, self.is_cut = True, is_cut

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    def take(self, count: int) -> str:
        """Returns the next `count` characters, which must be there, and goes past them."""
        text = self._text[self._at : self._at + count]
        self._at += count
        return text

    def unread(self, count: int) -> None:
        """Goes back over the `count` characters that were read last."""
        self._at -= count

    def keep(self, behind: int = 0) -> None:
        """What was read since, and the `behind` characters before, can be read again."""
        self._kept = self._at - behind

    @property
    def is_kept(self) -> bool:
        return self._kept is not None

    def release(self) -> None:
        self._kept = None

    def go_back(self) -> None:
        """Goes back to where `keep` was called."""
        assert self._kept is not None, "there is a place to go back to"
        self._at, self._kept = self._kept, None

    def more(self) -> Step[bool]:
        """Waits until a character is there; returns False if the text has ended."""
        while self._at == len(self._text):
            if self.is_ended:
                return False
            yield
        return True

    def peek(self) -> Step[str]:
        """Returns the next character, or "" at the end."""
        return self._text[self._at] if (yield from self.more()) else ""

    def skip_space(self) -> Step[None]:
        """Goes past white space."""
        while (yield from self.more()):
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return

    def accept(self, markers: Markers) -> Step[str]:
        """Goes past the marker that comes next and returns it, or "" if none does."""
        while True:
            text = self.rest
            if not self.is_ended and markers.texts and markers.may_begin(text):
                yield
                continue
            return self.take(len(markers.match(text)))

    def until(self, markers: Markers, emit: Emit) -> Step[str]:
        """Gives `emit` all text up to a marker as it comes, goes past the marker and returns it;
        "" if the text ends before one comes."""
        while True:
            text = self.rest
            found = markers.search(text)
            if found is not None:
                if found.start():
                    emit(text[: found.start()])
                self.take(found.end())
                return found[0]
            num = len(text) - (0 if self.is_ended else markers.num_held(text))
            if num:
                emit(self.take(num))
            if self.is_ended:
                return ""
            yield

    def read(self, markers: Markers, limit: int) -> Step[tuple[str, str]]:
        """Returns the text up to a marker, and the marker.

        Raises BrokenCallError if none comes within `limit` characters.
        """
        parts: list[str] = []
        size = 0

        def emit(text: str) -> None:
            nonlocal size
            parts.append(text)
            size += len(text)
            if size > limit:
                raise BrokenCallError

        marker = yield from self.until(markers, emit)
        if not marker and markers.texts:
            raise BrokenCallError
        return "".join(parts), marker


_SPACE = re.compile(r"\s*")
