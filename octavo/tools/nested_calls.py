"""Grammars of calls whose arguments nest in a notation of their own; a call is read whole.

Rows of the table are made of these; called by `answer_parser` behind the marker of a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.tools.calls import MAX_NAME_LENGTH, Calls
from octavo.tools.frames import Frame
from octavo.tools.marks import Marks
from octavo.tools.nested_frames import Braces, Elements
from octavo.tools.source import BrokenCallError, Markers, Source, Step
from octavo.tools.typed_values import dumped, property_of, types_of, value_of

_MAX_CALL_LENGTH = 256 * 1024
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BraceCall:
    """`call:f{key:<quote>text<quote>,n:42}`: keys without quotes, texts in a quote of their own."""

    quote: str
    prefix: str = "call:"

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        content = Braces(name, schema, self.quote).object(schema, 0)
        return Frame(begin=f"{self.prefix}{name}", content=content)

    def bound(self, marks: Marks) -> BraceCall:
        return BraceCall(quote=marks.bind(self.quote), prefix=self.prefix)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.quote,)

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads the call behind one marker. Raises BrokenCallError if it is none."""
        text, end = yield from source.read(closes, _MAX_CALL_LENGTH)
        source.unread(len(end))
        name, brace, inner = text.strip().removeprefix(self.prefix).partition("{")
        if not brace:
            raise BrokenCallError
        reader = _Braces("{" + inner, self.quote)
        arguments = reader.value()
        if not isinstance(arguments, dict) or reader.rest.strip():
            raise BrokenCallError
        calls.begin(name.strip())
        calls.add(dumped(arguments))
        calls.end()


class _Braces:
    def __init__(self, text: str, quote: str) -> None:
        self.rest = text
        self._quote = quote

    def value(self, depth: int = 0) -> Any:
        """Returns the value that comes next. Raises BrokenCallError if there is none."""
        if depth > _MAX_DEPTH:
            raise BrokenCallError
        if self._takes(self._quote):
            text, quote, self.rest = self.rest.partition(self._quote)
            if not quote:
                raise BrokenCallError
            return text
        if self._takes("{"):
            found: dict[str, Any] = {}
            while not self._takes("}"):
                key = self.value(depth + 1) if self.rest.startswith(self._quote) else self._key()
                if not self._takes(":"):
                    raise BrokenCallError
                found[str(key)] = self.value(depth + 1)
                self._takes(",")
            return found
        if self._takes("["):
            items = []
            while not self._takes("]"):
                items.append(self.value(depth + 1))
                self._takes(",")
            return items
        word = re.match(r"[^,\]}\s]+", self.rest)
        if word is None:
            raise BrokenCallError
        self.rest = self.rest[word.end() :]
        return value_of(word[0], frozenset())

    def _key(self) -> str:
        key = re.match(r"[^:,{}\[\]]+", self.rest)
        if key is None:
            raise BrokenCallError
        self.rest = self.rest[key.end() :]
        return key[0].strip()

    def _takes(self, text: str) -> bool:
        self.rest = self.rest.lstrip()
        if not self.rest.startswith(text):
            return False
        self.rest = self.rest[len(text) :]
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementCall:
    """`<invoke name="f"><key>v</key></invoke>` with a prefix before every tag: parameters are
    elements, and so are fields of objects; items of lists are `<item>`."""

    prefix: str

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        content = Elements(name, schema, self.prefix).object(schema, 0)
        return Frame(begin=f'"{name}">', content=content)

    def bound(self, marks: Marks) -> ElementCall:
        return ElementCall(prefix=marks.bind(self.prefix))

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prefix,)

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads the call behind one marker. Raises BrokenCallError if it is none."""
        header, _ = yield from source.read(Markers((">",)), MAX_NAME_LENGTH)
        text, end = yield from source.read(closes, _MAX_CALL_LENGTH)
        source.unread(len(end))
        name = header.strip().strip("\"'")
        schema = calls.schema_of(name)
        reader = _Elements(text, self.prefix, schema)
        arguments = reader.fields(schema)
        if reader.rest.strip():
            raise BrokenCallError
        calls.begin(name)
        calls.add(dumped(arguments))
        calls.end()


class _Elements:
    def __init__(self, text: str, prefix: str, root: Mapping[str, Any]) -> None:
        self.rest = text
        self._prefix = prefix
        self._root = root
        self._opening = re.compile(rf"\s*{re.escape(prefix)}<([^</>][^>]*)>")

    def fields(self, schema: object, depth: int = 0) -> dict[str, Any]:
        """Returns the elements that come next, by name."""
        known = schema if isinstance(schema, Mapping) else {}
        found: dict[str, Any] = {}
        while (name := self._opened()) is not None:
            found[name] = self._value(name, property_of(known, name), depth)
        return found

    def _value(self, name: str, schema: object, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise BrokenCallError
        types = types_of(schema, self._root)
        closing = f"{self._prefix}</{name}>"
        following = self._opening.match(self.rest)
        if following is None:
            text, close, self.rest = self.rest.partition(closing)
            if not close or self._prefix in text:
                raise BrokenCallError
            if not text and "array" in types:
                return []
            if not text and "object" in types:
                return {}
            return value_of(text, types)
        if following[1] == "item" and "object" not in types:
            items, inner = [], schema.get("items", {}) if isinstance(schema, Mapping) else {}
            while self._opened() is not None:
                items.append(self._value("item", inner, depth + 1))
            value: Any = items
        else:
            value = self.fields(schema, depth + 1)
        self.rest = self.rest.lstrip()
        if not self.rest.startswith(closing):
            raise BrokenCallError
        self.rest = self.rest[len(closing) :]
        return value

    def _opened(self) -> str | None:
        found = self._opening.match(self.rest)
        if found is None:
            return None
        self.rest = self.rest[found.end() :]
        return found[1]
