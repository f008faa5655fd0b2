"""Grammar of calls that are written as in Python: `[f(a=1, b="x"), g()]`.

Rows of the table are made of it; called by `answer_parser`. A call is read whole before it is told
of. Nothing is ever evaluated but literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.tools.calls import Calls
from octavo.tools.frames import (
    Frame,
    Node,
    constant,
    either,
    parameters_of,
    schema_node,
    sequence,
)
from octavo.tools.marks import MARKS, Marks
from octavo.tools.source import BrokenCallError, Markers, Source, Step
from octavo.tools.typed_values import dumped, property_of

_MAX_CALL_LENGTH = 256 * 1024
_NAME = re.compile(r"[A-Za-z_][\w.\-]*\Z")
_OPEN_PARENTHESIS = Markers(("(",))
_COMMA = Markers((",",))
_LIST_END = Markers(("]",))
_NEXT = re.compile(rf"[\"'()\[\]{{}}\\{MARKS}]")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonCalls:
    """A list of calls; without brackets one call a line is taken, too."""

    def bound(self, marks: Marks) -> PythonCalls:
        return self

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        """JSON's literals are read as Python's are."""
        required, optional = parameters_of(schema)

        def written(key: str, before: str) -> Node:
            value = schema_node(property_of(schema, key), schema)
            return sequence(constant(f"{before}{key}="), value)

        parts = [written(key, ", " if place else "") for place, key in enumerate(required)]
        if required:
            parts += [either(constant(""), written(key, ", ")) for key in optional]
        elif optional:
            parts = [either(constant(""), *(written(key, "") for key in optional))]
        content = sequence(*parts) if parts else constant("")
        return Frame(begin=f"{name}(", content=content, end=")")

    @property
    def texts(self) -> tuple[str, ...]:
        return ()

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads all calls behind one marker. Raises BrokenCallError before one is announced."""
        yield from source.skip_space()
        is_list = bool((yield from source.accept(Markers(("[",)))))
        while True:
            yield from source.skip_space()
            if is_list and (yield from source.accept(_LIST_END)):
                return
            marker = "" if is_list else (yield from source.accept(closes))
            if marker:
                source.unread(len(marker))
                return
            if not (yield from source.more()):
                return
            yield from _call(source, calls)
            yield from source.skip_space()
            yield from source.accept(_COMMA)


def _call(source: Source, calls: Calls) -> Step[None]:
    if not source.is_kept:
        source.keep()
    name, _ = yield from source.read(_OPEN_PARENTHESIS, 256)
    if not _NAME.match(name.strip()):
        raise BrokenCallError
    inner = yield from _up_to_parenthesis(source)
    arguments = _arguments(inner)
    calls.begin(name.strip())
    calls.add(dumped(arguments))
    calls.end()


def _up_to_parenthesis(source: Source) -> Step[str]:
    """Returns what stands before the parenthesis that closes a call."""
    parts: list[str] = []
    closers, quote, size = [")"], "", 0
    while (yield from source.more()):
        text = source.rest
        found = _NEXT.search(text)
        if found is None:
            parts.append(source.take(len(text)))
        elif found[0] == "\\":
            # The character behind it belongs to it.
            while len(source.rest) < found.end() + 1 and not source.is_ended:
                yield
            parts.append(source.take(found.end() + 1))
        else:
            parts.append(source.take(found.end()))
            if quote:
                quote = "" if found[0] == quote else quote
            elif found[0] in "\"'":
                quote = found[0]
            elif found[0] in _PAIRS:
                closers.append(_PAIRS[found[0]])
            elif found[0] != closers.pop():
                raise BrokenCallError
            elif not closers:
                return "".join(parts)[:-1]
        size += len(parts[-1])
        if size > _MAX_CALL_LENGTH:
            raise BrokenCallError
    raise BrokenCallError


def _arguments(inner: str) -> dict[str, Any]:
    """Returns the named arguments of a call. Raises BrokenCallError if there are others."""
    try:
        call = ast.parse(f"f({inner})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise BrokenCallError
        return {str(one.arg): _literal(one.value) for one in call.keywords if one.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        raise BrokenCallError from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        values = map(_literal, node.values)
        return {str(key): value for key, value in zip(keys, values, strict=True)}
    value = ast.literal_eval(node)
    if isinstance(value, float) and value - value != 0:
        raise BrokenCallError  # JSON has no infinity
    if value is not None and not isinstance(value, str | int | float):
        raise BrokenCallError
    return value
