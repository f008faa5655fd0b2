"""Grammars of texts that stand within JSON's quotes: the same texts, as JSON spells them.

Used by `structural_tag`. Every character of a text or a pattern becomes a pattern of its own, as
JSON spells it, and what was a terminal becomes a rule: the lexer takes the longest match and never
goes back, so that within a longer one the backslash of one escape would shut out all others. Only
where a grammar ignores something between its terminals they stay terminals. Escapes have one
spelling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from octavo.errors import RequestError

_LAST = 0x10FFFF
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\\\"}
"""Characters that JSON writes with a backslash, and the pattern of what follows it."""
_ESCAPED = [*range(32), 34, 92]
_SPACE = [
    *((9, 13), (32, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
]
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*)
    |(?P<range>"(?:[^"\\\n]|\\.)*"\s*\.\.\s*"(?:[^"\\\n]|\\.)*")
    |(?P<text>"(?:[^"\\\n]|\\.)*")(?P<is_any_case>i?)
    |/(?P<pattern>(?:[^/\\\n]|\\.)+)/(?P<flags>[a-z]*)
    |(?P<name>\b_?[A-Z][A-Z0-9_]*\b)
    |(?P<unknown>%(?:json|regex|lark|import|declare)\b|<[^>\n]*>|[@"/])""",
    re.VERBOSE,
)

Ranges = list[tuple[int, int]]


def quoted_lark(grammar: str) -> str:
    """Returns the grammar, in Lark's form, of the texts of `grammar` within JSON's quotes.

    Raises RequestError for what has no such form: special tokens, imports, grammars of other kinds,
    and patterns with what is more than characters, groups and repetition.
    """

    write = _as_pattern if re.search(r"^\s*%ignore\b", grammar, re.MULTILINE) else _as_rule

    def spelt(found: re.Match[str]) -> str:
        if found["comment"] is not None:
            return ""
        if found["name"] is not None:
            return found[0] if write is _as_pattern else f"quoted_{found['name'].lower()}"
        if found["range"] is not None:
            first, last = (_text(one) for one in re.findall(r'"(?:[^"\\\n]|\\.)*"', found["range"]))
            if len(first) != 1 or len(last) != 1:
                raise _refused(found["range"])
            return write([_Set([(ord(first), ord(last))])])
        if found["text"] is not None:
            sets = [_one(char) for char in _text(found["text"])]
            return write([one.in_any_case() for one in sets] if found["is_any_case"] else sets)
        if found["pattern"] is not None and set(found["flags"]) <= {"i", "s"}:
            return write(_Pattern(found["pattern"], found["flags"]).pieces())
        raise _refused(found[0])

    return _TOKEN.sub(spelt, grammar)


def _as_pattern(pieces: Sequence[_Set | str]) -> str:
    """Returns one terminal."""
    if not pieces:
        return '""'
    return f"/{''.join(one if isinstance(one, str) else one.pattern() for one in pieces)}/"


def _as_rule(pieces: Sequence[_Set | str]) -> str:
    """Returns a group of terminals of one character each."""
    found: list[str] = ["("]
    for piece in [*pieces, ")"]:
        one = f"/{piece.pattern()}/" if isinstance(piece, _Set) else piece.replace("?:", "")
        if one in ("|", ")") and found[-1] in ("|", "("):
            found.append('""')  # a way with nothing in it
        if one == "?" and (found[-1] in ("*", "+", "?") or found[-1].startswith("{")):
            continue  # lazy or not, the texts are the same
        found.append(one)
    return " ".join(found)


def _text(literal: str) -> str:
    try:
        return json.loads(literal)
    except ValueError as error:
        raise _refused(literal) from error


def _refused(what: str) -> RequestError:
    message = (
        f"a grammar of syntax lark with {what[:80]} cannot be held to within JSON, where this "
        "model's format of calls has it; write it as patterns and texts, or use syntax regex"
    )
    return RequestError(message, param="tools", code="unsupported_field")


@dataclass(slots=True)
class _Set:
    """Characters: ranges and classes of the library's, or all others."""

    ranges: Ranges = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    r"""Like \d: none of them has a character that JSON escapes."""
    is_negated: bool = False

    def in_any_case(self) -> _Set:
        """Returns the same with both cases of ASCII's letters."""
        more: Ranges = []
        for first, last in self.ranges:
            for low, high, other in ((65, 90, 32), (97, 122, -32)):
                begin, end = max(first, low), min(last, high)
                if begin <= end:
                    more.append((begin + other, end + other))
        return _Set([*self.ranges, *more], self.classes, self.is_negated)

    def pattern(self) -> str:
        """Returns a pattern of one such character as JSON spells it."""
        escaped = [code for code in _ESCAPED if self._has(code) is not self.is_negated]
        ranges, classes = self.ranges, "".join(self.classes)
        if self.is_negated:
            plain = f"[^{classes}{_written([*ranges, (0, 31), (34, 34), (92, 92)])}]"
        else:
            inner = classes + _written(_without_escaped(ranges))
            plain = f"[{inner}]" if inner else ""
        ways = [plain] if plain else []
        ways += [rf"\\{_SHORT[code]}" for code in escaped if code in _SHORT]
        ways += [rf"\\u00{code:02x}" for code in escaped if code not in _SHORT]
        if not ways:
            raise _refused("a set of no characters")
        return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

    def _has(self, code: int) -> bool:
        return any(first <= code <= last for first, last in self.ranges)


def _without_escaped(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: Ranges = []
    for first, last in ranges:
        for low, high in ((32, 33), (35, 91), (93, _LAST)):
            if max(first, low) <= min(last, high):
                found.append((max(first, low), min(last, high)))
    return found


def _written(ranges: Iterable[tuple[int, int]]) -> str:
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges)


class _Pattern:
    """Reads one pattern from left to right."""

    def __init__(self, pattern: str, flags: str) -> None:
        self._pattern, self._place = pattern, 0
        self._is_any_case, self._is_dot_all = "i" in flags, "s" in flags

    def pieces(self) -> list[_Set | str]:
        """Returns characters, and what stands between them. Raises RequestError."""
        pieces: list[_Set | str] = []
        while self._place < len(self._pattern):
            pieces.append(self._piece())
        return pieces

    def _piece(self) -> _Set | str:
        pattern, start = self._pattern, self._place
        if found := re.compile(r"\((?:\?:)?(?!\?)|[)|*+?]|\{[0-9]+(?:,[0-9]*)?\}").match(
            pattern, start
        ):
            self._place = found.end()
            return found[0]
        char = self._next()
        if char == "[":
            return self._told(self._class())
        if char == ".":
            return _Set([] if self._is_dot_all else [(10, 10)], is_negated=True)
        if char in "(^$":
            raise _refused(f"/{pattern}/")
        return self._told(self._escape() if char == "\\" else _one(char))

    def _told(self, found: _Set) -> _Set:
        return found.in_any_case() if self._is_any_case else found

    def _next(self) -> str:
        if self._place >= len(self._pattern):
            raise _refused(f"/{self._pattern}/")
        self._place += 1
        return self._pattern[self._place - 1]

    def _class(self) -> _Set:
        is_negated = self._pattern.startswith("^", self._place)
        self._place += is_negated
        ranges: Ranges = []
        classes: list[str] = []
        is_first = True
        while (char := self._next()) != "]" or is_first:
            is_first = False
            if char == "[" or self._pattern[self._place - 1 :].startswith(("&&", "--", "~~")):
                raise _refused(f"/{self._pattern}/")
            one = self._escape() if char == "\\" else _one(char)
            if one.is_negated:
                raise _refused(f"/{self._pattern}/")
            rest = self._pattern[self._place :]
            if len(one.ranges) == 1 and rest.startswith("-") and not rest.startswith("-]"):
                self._place += 1
                char = self._next()
                last = self._escape() if char == "\\" else _one(char)
                if len(last.ranges) != 1 or last.is_negated or last.ranges[0] < one.ranges[0]:
                    raise _refused(f"/{self._pattern}/")
                one = _Set([(one.ranges[0][0], last.ranges[0][1])])
            ranges += one.ranges
            classes += one.classes
        return _Set(ranges, classes, is_negated)

    def _escape(self) -> _Set:
        char = self._next()
        if char in "dw":
            return _Set(classes=[f"\\{char}"])
        if char in "DW":
            return _Set(classes=[f"\\{char.lower()}"], is_negated=True)
        if char in "sS":
            return _Set(list(_SPACE), is_negated=char == "S")
        if char in _CONTROLS:
            return _one(chr(_CONTROLS[char]))
        if char in "xu":
            digits = "[0-9a-fA-F]{2}" if char == "x" else "[0-9a-fA-F]{4}"
            found = re.compile(rf"\{{([0-9a-fA-F]+)\}}|({digits})").match(
                self._pattern, self._place
            )
            if found is not None and (code := int(found[1] or found[2], 16)) <= _LAST:
                self._place = found.end()
                return _one(chr(code))
        if char.isalnum():
            raise _refused(f"/{self._pattern}/")
        return _one(char)


def _one(char: str) -> _Set:
    return _Set([(ord(char), ord(char))])
