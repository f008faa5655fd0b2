"""Grammars of calls whose arguments are JSON: an object that names the tool, or a name before it.

Rows of the table are made of these; called by `answer_parser` behind the marker of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.tools.calls import MAX_NAME_LENGTH, Calls
from octavo.tools.frames import Frame, constant, schema_node, sequence
from octavo.tools.json_text import pass_value
from octavo.tools.marks import Marks
from octavo.tools.source import BrokenCallError, Markers, Source, Step

_NAMES = ("name", "tool_name", "tool")
_ARGUMENTS = ("arguments", "parameters", "args")
_IDS = ("id", "tool_call_id")
_COMMA = Markers((",", ";"))
_COLON = Markers((":",))
_LIST_END = Markers(("]",))
_OBJECT_END = Markers(("}",))


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCalls:
    """`{"name": "f", "arguments": {...}}`, or a list of such objects."""

    joined_by: str = ""
    """What may stand between objects that are in no list."""
    key: str = "arguments"
    """The word that models use for arguments; others are read, too."""

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        begin = f'{{"name": "{name}", "{self.key}": '
        return Frame(begin=begin, content=schema_node(schema, schema), end="}")

    def bound(self, marks: Marks) -> JsonCalls:
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        return ()

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads all calls behind one marker. Raises BrokenCallError before one is announced."""
        yield from source.skip_space()
        if (yield from source.peek()) != "[":
            yield from _object(source, calls, closes)
            joiner = Markers((self.joined_by,))
            while self.joined_by:
                yield from source.skip_space()
                if not (yield from source.accept(joiner)):
                    return
                yield from source.skip_space()
                yield from _object(source, calls, closes)
            return
        source.take(1)
        yield from source.skip_space()
        while not (yield from source.accept(_LIST_END)):
            yield from _object(source, calls, closes)
            yield from source.skip_space()
            yield from source.accept(_COMMA)
            yield from source.skip_space()
            if (yield from source.peek()) not in ("{", "]"):
                return  # it breaks off here; what was called was called


def _object(source: Source, calls: Calls, closes: Markers) -> Step[None]:
    """Reads one call. What breaks after its announcement ends it and is left to be read."""
    if (yield from source.peek()) != "{":
        raise BrokenCallError
    if not source.is_kept:
        source.keep()
    found = _Found(source, calls, closes)
    is_whole = yield from found.fields()
    if not calls.is_open:
        if not is_whole:
            raise BrokenCallError
        calls.begin(found.name, found.id)
        calls.add(_arguments_of(found.waiting))
    calls.end()


class _Found:
    """What is known of one call."""

    def __init__(self, source: Source, calls: Calls, closes: Markers) -> None:
        self._source, self._calls, self._closes = source, calls, closes
        self.name = self.id = self.waiting = ""

    def fields(self) -> Step[bool]:
        """Reads the fields of one object; returns whether it was whole."""
        source = self._source
        source.take(1)
        yield from source.skip_space()
        if (yield from source.accept(_OBJECT_END)):
            return True
        while True:
            key = yield from self._text()
            yield from source.skip_space()
            if key is None or not (yield from source.accept(_COLON)):
                return False
            yield from source.skip_space()
            if not (yield from self._field(key)):
                return False
            yield from source.skip_space()
            if (yield from source.accept(_OBJECT_END)):
                return True
            if not (yield from source.accept(_COMMA)):
                return False
            yield from source.skip_space()

    def _field(self, key: str) -> Step[bool]:
        source, calls = self._source, self._calls
        first = yield from source.peek()
        if key == "function" and first == "{":
            return (yield from self.fields())
        if key in (*_NAMES, *_IDS, "function") and first == '"':
            value = yield from self._text()
            if value is None:
                return False
            if key in _IDS:
                self.id = value
            else:
                self.name = self.name or value
            return True
        if key in _ARGUMENTS and not calls.is_open:
            if not self.name or first != "{":
                self.waiting, is_whole = yield from _value(source)
                return is_whole
            calls.begin(self.name, self.id)
            if (yield from pass_value(source, calls.add)):
                return True
            # No JSON: its arguments are whatever the model wrote.
            yield from _pass_broken(source, calls, self._closes)
            return False
        if calls.must_be_known and key != "type":
            return False  # some other object: a text in JSON
        _, is_whole = yield from _value(source)
        return is_whole

    def _text(self) -> Step[str | None]:
        """Returns a short string, None if there is none."""
        if (yield from self._source.peek()) != '"':
            return None
        spelled, is_whole = yield from _value(self._source, MAX_NAME_LENGTH)
        try:
            return json.loads(spelled, strict=False) if is_whole else None
        except ValueError:
            return None


def _value(source: Source, limit: int | None = None) -> Step[tuple[str, bool]]:
    parts: list[str] = []

    def emit(text: str) -> None:
        parts.append(text)
        if limit is not None and sum(map(len, parts)) > limit:
            raise BrokenCallError

    is_whole = yield from pass_value(source, emit)
    return "".join(parts), is_whole


def _pass_broken(source: Source, calls: Calls, closes: Markers) -> Step[None]:
    marker = yield from source.until(closes, calls.add)
    source.unread(len(marker))


def _arguments_of(spelled: str) -> str:
    """Returns arguments that are not an object at first sight: a text that spells one, or none."""
    if spelled.startswith('"'):
        try:
            value: Any = json.loads(spelled, strict=False)
        except ValueError:
            return spelled
        return value if isinstance(value, str) else spelled
    return "" if spelled == "null" else spelled


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedJson:
    """A name, a marker, and the arguments as JSON: `functions.f:0<|argument|>{...}`."""

    separators: tuple[str, ...]
    """Between name and arguments; "{" stands for arguments that follow at once."""
    header: str = r"(?P<name>\S+)"
    """A regular expression of what stands before the separator, without the spaces around it:
    groups `name` and perhaps `id`."""
    id_marker: str = ""
    """Between the name and an id, if there is one."""
    fence: str = ""
    """Behind the arguments, before what closes the call."""
    written: str = "NAME"
    """How name and separators stand before the arguments."""
    written_end: str = ""
    """What stands behind them."""
    is_object_taken: bool = False
    """Whether an object with the name in it, or a list of them, is taken, too."""

    def bound(self, marks: Marks) -> NamedJson:
        return replace(
            self,
            separators=tuple(map(marks.bind, self.separators)),
            header=marks.bind(self.header),
            id_marker=marks.bind(self.id_marker),
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.separators, self.header, self.id_marker)

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        begin, number, rest = self.written.replace("NAME", name).partition("NUMBER")
        content = schema_node(schema, schema)
        if number:
            digits = {"type": "regex", "pattern": "[0-9]"}
            content = sequence(digits, constant(rest), content)
        return Frame(begin=begin, content=content, end=self.written_end)

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads the call behind one marker. Raises BrokenCallError before it is announced."""
        yield from source.skip_space()
        if self.is_object_taken and (yield from source.peek()) in ("{", "["):
            yield from JsonCalls().read(source, calls, closes)
            return
        ends = Markers((*self.separators, *closes.texts))
        header, separator = yield from source.read(ends, MAX_NAME_LENGTH)
        given_id = ""
        if self.id_marker:
            header, _, given_id = header.partition(self.id_marker)
        found = re.fullmatch(self.header, header.strip())
        if found is None:
            raise BrokenCallError
        if separator == "{" or separator in closes:
            source.unread(len(separator))
        groups = found.groupdict()
        calls.begin(groups["name"], given_id.strip() or groups.get("id") or "")
        if separator not in closes:
            yield from pass_arguments(source, calls, closes)
            yield from source.skip_space()
            yield from source.accept(Markers((self.fence,)))
        calls.end()


def pass_arguments(source: Source, calls: Calls, closes: Markers) -> Step[None]:
    """Gives the call that was begun all arguments up to a marker, which is left to be read."""
    yield from source.skip_space()
    marker = yield from source.accept(closes)
    if marker:
        source.unread(len(marker))  # there are none
    elif not (yield from pass_value(source, calls.add)):
        yield from _pass_broken(source, calls, closes)
