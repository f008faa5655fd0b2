"""Grammar of calls whose parameters stand in tags: a name, then name and value of each parameter.

Rows of the table are made of it; called by `answer_parser` behind the marker of a call. The values
are plain text, typed by the tool's schema or by the tag; they go on as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.tools.calls import MAX_NAME_LENGTH, Calls
from octavo.tools.frames import (
    Frame,
    Node,
    constant,
    either,
    parameters_of,
    schema_node,
    sequence,
    text_node,
)
from octavo.tools.json_calls import pass_arguments
from octavo.tools.marks import Marks
from octavo.tools.source import BrokenCallError, Markers, Source, Step
from octavo.tools.typed_values import dumped, is_text, property_of, types_of, value_of

_IS_TEXT = {"string": True, "true": True}
"""What a tag says of its value: the name of a type, or whether it is a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCall:
    """`NAME<name_end>` then `<opens>KEY<key_end>VALUE<closes>` for each parameter."""

    name_end: str
    """Behind the tool's name; the first parameter may follow instead."""
    parameter: str
    """Before a parameter's name."""
    key_end: str
    value_begin: str = ""
    """Between that and the value; white space may stand before it."""
    value_end: str
    header: str = r"""["']?(?P<name>[^"'\s>]+)["']?.*"""
    """A regular expression of the tool's name as it stands there."""
    key: str = r"""["']?(?P<key>[^"'>]+?)["']?(?:\s+(?:string|type)=["']?(?P<type>\w+)["']?)?\s*"""
    """The same of a parameter's name, and of what its tag says of its value."""
    has_lines: bool = False
    """Whether a value stands on lines of its own."""
    takes_json: bool = False
    """Whether all arguments may come as one JSON object instead."""

    written: str = "NAME>"
    """How the tool's name stands, and the NUMBER of the call."""
    written_parameter: str = ""
    """How a parameter stands, for KEY, VALUE, TEXT (whether it is a text: true or false) and TYPE
    (string, or the JSON type of its values)."""

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        required, optional = parameters_of(schema)
        parts = [self._written(key, schema) for key in required]
        parts += [either(constant(""), self._written(key, schema)) for key in optional]
        begin, number, rest = self.written.replace("NAME", name).partition("NUMBER")
        if number:
            parts = [{"type": "regex", "pattern": "[0-9]"}, constant(rest), *parts]
        content = sequence(*parts) if parts else constant("")
        return Frame(begin=begin, content=content)

    def _written(self, key: str, schema: Mapping[str, Any]) -> Node:
        """Returns one parameter: JSON of its schema, or text up to what ends it."""
        inner = property_of(schema, key)
        types = types_of(inner, schema)
        options = inner.get("enum") if isinstance(inner, Mapping) else None
        has_text = "string" in types or not types
        kind = next(iter(types)) if len(types) == 1 else "object"
        text = self.written_parameter.replace("TYPE", "string" if has_text else kind)
        begin, _, end = text.replace("TEXT", "true" if has_text else "false").partition("VALUE")
        begin = begin.replace("KEY", key)
        if isinstance(options, list) and options and all(isinstance(o, str) for o in options):
            return sequence(constant(begin), either(*map(constant, options)), constant(end))
        if has_text:
            return text_node(inner, begin, end)
        return sequence(constant(begin), schema_node(inner, schema), constant(end))

    def bound(self, marks: Marks) -> TaggedCall:
        names = ("name_end", "parameter", "key_end", "value_begin", "value_end")
        return replace(self, **{name: marks.bind(getattr(self, name)) for name in names})

    @property
    def texts(self) -> tuple[str, ...]:
        names = (self.name_end, self.parameter, self.key_end, self.value_begin, self.value_end)
        return tuple(name for name in names if name)

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads the call behind one marker. Raises BrokenCallError before it is announced."""
        ends = Markers((self.name_end, self.parameter, *closes.texts))
        header, end = yield from source.read(ends, MAX_NAME_LENGTH)
        found = re.fullmatch(self.header, header.strip(), re.DOTALL)
        if found is None:
            raise BrokenCallError
        if end != self.name_end:
            source.unread(len(end))
        calls.begin(found["name"])
        yield from source.skip_space()
        if self.takes_json and (yield from source.peek()) == "{":
            yield from pass_arguments(source, calls, closes)
        else:
            yield from self._parameters(source, calls, found["name"], closes)
        calls.end()

    def _parameters(self, source: Source, calls: Calls, name: str, closes: Markers) -> Step[None]:
        """Reads parameters up to the call's end and what closes it."""
        schema = calls.schema_of(name)
        parameter, anything = Markers((self.parameter,)), Markers((self.parameter, *closes.texts))
        seen: set[str] = set()
        while True:
            yield from source.skip_space()
            if not (yield from source.accept(parameter)):
                # Whatever stands between parameters is none.
                found = yield from source.until(anything, _ignore)
                if found != self.parameter:
                    source.unread(len(found))
                    break
            key, kind = yield from self._key(source)
            if not key:
                break
            is_new = key not in seen
            seen.add(key)
            add: Callable[[str], None] = calls.add if is_new else _ignore
            add(("{" if len(seen) == 1 else ", ") + dumped(key) + ": ")
            types = types_of(property_of(schema, key), schema)
            if kind:
                types = frozenset(("string",)) if _IS_TEXT.get(kind, False) else types - {"string"}
            if not (yield from self._value(source, add, types, closes)):
                return  # cut off: nobody can say what the value would have been
        if seen:
            calls.add("}")

    def _key(self, source: Source) -> Step[tuple[str, str]]:
        try:
            header, _ = yield from source.read(Markers((self.key_end,)), MAX_NAME_LENGTH)
        except BrokenCallError:
            return "", ""
        if self.value_begin:
            yield from source.skip_space()
            yield from source.accept(Markers((self.value_begin,)))
        found = re.fullmatch(self.key, header.strip(), re.DOTALL)
        return (found["key"], found["type"] or "") if found else (header.strip(), "")

    def _value(
        self, source: Source, add: Callable[[str], None], types: frozenset[str], closes: Markers
    ) -> Step[bool]:
        """Reads one value; returns whether it was whole."""
        text = _TextValue(add) if is_text(types) else _TypedValue(add, types)
        text.has_lines = self.has_lines
        # A model may forget to close a value: the next tag does it then.
        ends = Markers((self.value_end, self.parameter, *closes.texts))
        end = yield from source.until(ends, text.add)
        if not end and source.is_cut:
            return False
        if end != self.value_end:
            source.unread(len(end))
        text.end()
        return True


class _TextValue:
    """A text that goes on as it comes; line breaks around it are not part of it."""

    def __init__(self, add: Callable[[str], None]) -> None:
        self._add = add
        self._has_begun = False
        self._held = ""
        self.has_lines = False

    def add(self, text: str) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._add('"')
            text = text.removeprefix("\n") if self.has_lines else text
        text = self._held + text
        self._held = "\n" if self.has_lines and text.endswith("\n") else ""
        if self._held:
            text = text[:-1]
        if text:
            self._add(dumped(text)[1:-1])

    def end(self) -> None:
        self._add('"' if self._has_begun else '""')


class _TypedValue:
    """A value that is known when all of it is there."""

    def __init__(self, add: Callable[[str], None], types: frozenset[str]) -> None:
        self._add = add
        self._types = types
        self._parts: list[str] = []
        self.has_lines = False

    def add(self, text: str) -> None:
        self._parts.append(text)

    def end(self) -> None:
        text = "".join(self._parts)
        if self.has_lines:
            text = text.removeprefix("\n").removesuffix("\n")
        self._add(dumped(value_of(text, self._types)))


def _ignore(text: str) -> None:
    """Takes what is no part of a call."""
