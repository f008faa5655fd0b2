"""Owns how special tokens stand in text: each as one character that no text can have.

Made once a tokenizer and format. The detokeniser writes a mark for the id, the grammars look for
it: what a model spells out letter by letter is never taken for a token, nor a token for text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MARKS = "\udc00-\udfff"
"""The range of marks in a regular expression: halves of surrogate pairs, which UTF-8 cannot spell,
so that no decoded text holds one."""
_FIRST, _MOST = 0xDC00, 0x400


class Marks:
    """Special tokens that matter to a format."""

    __slots__ = ("_by_text", "_pattern", "_shown", "by_id")

    def __init__(self, special_tokens: Mapping[str, int], texts: Iterable[str]) -> None:
        """`special_tokens` are ids by text; those that stand within `texts` get a mark."""
        joined = "\n".join(texts)
        used = sorted((text for text in special_tokens if text in joined), key=len, reverse=True)
        self._by_text = {text: chr(_FIRST + n) for n, text in enumerate(used[:_MOST])}
        self.by_id: dict[int, str] = {
            special_tokens[text]: mark for text, mark in self._by_text.items()
        }
        self._shown = {mark: text for text, mark in self._by_text.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._by_text))) if used else None

    def bind(self, text: str) -> str:
        """Returns a format's text with marks in place of special tokens."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: self._by_text[found[0]], text)

    def show(self, text: str) -> str:
        """Returns a model's text with special tokens in place of marks."""
        if text.isascii() or not self._shown:
            return text
        return _MARK.sub(lambda found: self._shown.get(found[0], ""), text)

    def drop(self, text: str) -> str:
        """Returns a model's text without special tokens."""
        return text if text.isascii() else _MARK.sub("", text)


_MARK = re.compile(f"[{MARKS}]")

NO_MARKS = Marks({}, ())
