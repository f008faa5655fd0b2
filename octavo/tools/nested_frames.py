"""Owns how values are written, for grammars, in notations of their own that nest: a node a schema.

Used by the shapes of `nested_calls`. A notation of nodes has no recursion: a schema that refers to
itself is refused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import RequestError
from octavo.tools.frames import (
    Node,
    constant,
    either,
    parameters_of,
    schema_node,
    sequence,
    text_node,
)
from octavo.tools.typed_values import dumped, property_of, referred, types_of

MAX_DEPTH = 12
"""Levels of lists and objects, those of references among them."""
MAX_BOUND = 24
"""Items of a list that are counted; more of them are any number."""
ANY_DEPTH = 2
"""Levels of a value that no schema describes."""
_COMPOSED = ("string", "object", "array")
_ANY: Sequence[str] = ("string", "number", "boolean", "null", "array", "object")
_KEY = r"[A-Za-z_][A-Za-z0-9_]{0,39}"


class Notation(ABC):
    """Writes the values that a tool's parameters may have."""

    def __init__(self, tool: str, root: Mapping[str, Any]) -> None:
        """`root` is the schema of the tool's parameters, where references begin."""
        self._tool, self._root = tool, root

    @abstractmethod
    def object(self, schema: Mapping[str, Any], depth: int) -> Node:
        """Returns an object, what stands around its fields included."""

    @abstractmethod
    def array(self, item: object, bounds: tuple[int, int | None], depth: int) -> Node:
        """Returns a list of so many items."""

    @abstractmethod
    def text(self, schema: Mapping[str, Any]) -> Node:
        """Returns a text."""

    @abstractmethod
    def constant(self, value: Any) -> Node:
        """Returns exactly one value."""

    def value(self, schema: object, depth: int) -> Node:
        """Returns any value of a schema. Raises RequestError where nodes cannot say it."""
        self.check(depth)
        given = self.resolved(schema)
        if "const" in given:
            return self.constant(given["const"])
        if isinstance(given.get("enum"), list) and given["enum"]:
            return either(*map(self.constant, given["enum"]))
        if ways := ways_of(given):
            return either(*(self.value(one, depth + 1) for one in ways))
        types = sorted(types_of(given, self._root))
        if not types:
            types, given = self._any_types(depth), {"additionalProperties": True, **given}
        options = [self._composed(kind, given, depth) for kind in types if kind in _COMPOSED]
        scalars = [kind for kind in types if kind not in _COMPOSED]
        if scalars:
            kinds = scalars[0] if len(scalars) == 1 else scalars
            options.append(schema_node({**given, "type": kinds}, self._root))
        return options[0] if len(options) == 1 else either(*options)

    def check(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            message = (
                f"the schema of tool {self._tool} is nested more than {MAX_DEPTH} levels deep or "
                "refers to itself, and the model's format of calls cannot be held to that; make "
                "it flatter, or leave the choice to the model"
            )
            raise RequestError(message, param="tools")

    def resolved(self, schema: object) -> Mapping[str, Any]:
        """Returns what a schema refers to, if it does."""
        found = schema
        for _ in range(MAX_DEPTH):
            reference = found.get("$ref") if isinstance(found, Mapping) else None
            if not isinstance(reference, str):
                break
            found = referred(reference, self._root)
        return found if isinstance(found, Mapping) else {}

    def _any_types(self, depth: int) -> Sequence[str]:
        return _ANY if depth <= ANY_DEPTH else _ANY[:-2]

    def _composed(self, kind: str, schema: Mapping[str, Any], depth: int) -> Node:
        if kind == "string":
            return self.text(schema)
        if kind == "object":
            return self.object(schema, depth)
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        bounds = min(low, MAX_BOUND), high if high is None or high <= MAX_BOUND else None
        return self.array(schema.get("items", {}), bounds, depth)


def ways_of(schema: Mapping[str, Any]) -> Sequence[object]:
    """Returns the options of a schema that has some; they go before its types."""
    options = schema.get("anyOf") or schema.get("oneOf")
    return options if isinstance(options, list) else ()


class Braces(Notation):
    """`{key:<quote>text<quote>,n:42,list:[1,2]}`."""

    def __init__(self, tool: str, root: Mapping[str, Any], quote: str) -> None:
        super().__init__(tool, root)
        self._quote = quote

    def object(self, schema: Mapping[str, Any], depth: int) -> Node:
        required, optional = parameters_of(schema)
        if not required and not optional:
            is_open = schema.get("additionalProperties") not in (None, False)
            fields = self._free_fields(schema, depth) if is_open else constant("")
            return sequence(constant("{"), fields, constant("}"))

        def field(key: str, before: str) -> Node:
            inner = self.value(property_of(schema, key), depth + 1)
            return sequence(constant(f"{before}{self._key(key)}:"), inner)

        parts = [field(key, "," if place else "") for place, key in enumerate(required)]
        if required:
            parts += [either(constant(""), field(key, ",")) for key in optional]
        else:
            # One of them is the first; those behind it have a comma before them.
            behind = [either(constant(""), field(key, ",")) for key in optional]
            ways = [
                sequence(field(key, ""), *behind[place + 1 :]) for place, key in enumerate(optional)
            ]
            parts = [either(constant(""), *ways)]
        return sequence(constant("{"), *parts, constant("}"))

    def _key(self, key: str) -> str:
        return key if re.fullmatch(r"[\w.-]+", key) else self._written(key)

    def _free_fields(self, schema: Mapping[str, Any], depth: int) -> Node:
        inner = schema["additionalProperties"]
        value = self.value({} if inner is True else inner, depth + 1)
        key = {"type": "regex", "pattern": _KEY}
        return _listed(sequence(key, constant(":"), value), ",", (0, None))

    def array(self, item: Any, bounds: tuple[int, int | None], depth: int) -> Node:
        items = _listed(self.value(item, depth + 1), ",", bounds)
        return sequence(constant("["), items, constant("]"))

    def text(self, schema: Mapping[str, Any]) -> Node:
        return text_node(schema, self._quote, self._quote)

    def constant(self, value: Any) -> Node:
        return constant(self._written(value))

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote}{value}{self._quote}"
        if isinstance(value, Mapping):
            return (
                "{" + ",".join(f"{self._key(k)}:{self._written(v)}" for k, v in value.items()) + "}"
            )
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        return dumped(value)


class Elements(Notation):
    """`<key>v</key>` with a prefix before each tag; items of lists are `<item>`."""

    def __init__(self, tool: str, root: Mapping[str, Any], prefix: str) -> None:
        super().__init__(tool, root)
        self._prefix = prefix

    def element(self, name: str, schema: object, depth: int) -> Node:
        begin, end = f"{self._prefix}<{name}>", f"{self._prefix}</{name}>"
        self.check(depth)
        given = self.resolved(schema)
        if ways := ways_of(given):
            return either(*(self.element(name, one, depth + 1) for one in ways))
        types = types_of(given, self._root)
        if ("string" in types or not types) and not {"enum", "const"} & given.keys():
            return text_node(given, begin, end)
        return sequence(constant(begin), self.value(given, depth), constant(end))

    def object(self, schema: Mapping[str, Any], depth: int) -> Node:
        """Objects whose keys are free are empty: a tag must close with its own name."""
        required, optional = parameters_of(schema)
        parts = [self._field(schema, key, depth) for key in required]
        parts += [either(constant(""), self._field(schema, key, depth)) for key in optional]
        return sequence(*parts) if parts else constant("")

    def _field(self, schema: Mapping[str, Any], key: str, depth: int) -> Node:
        return self.element(key, property_of(schema, key), depth + 1)

    def array(self, item: Any, bounds: tuple[int, int | None], depth: int) -> Node:
        return _listed(self.element("item", item, depth + 1), "", bounds)

    def text(self, schema: Mapping[str, Any]) -> Node:
        """Returns one that needs no tag to end it."""
        return {"type": "regex", "pattern": r"[^<>\[\]]*"}

    def constant(self, value: Any) -> Node:
        return constant(self._written(value))

    def _written(self, value: Any) -> str:
        if isinstance(value, Mapping | list):
            fields = value.items() if isinstance(value, Mapping) else (("item", v) for v in value)
            return "".join(
                f"{self._prefix}<{key}>{self._written(one)}{self._prefix}</{key}>"
                for key, one in fields
            )
        return value if isinstance(value, str) else dumped(value)


def _listed(item: Node, joint: str, bounds: tuple[int, int | None]) -> Node:
    """Returns so many items, at least and at most, with a joint between two."""
    low, high = bounds
    further = sequence(constant(joint), item)
    if high is not None:
        if not high:
            return constant("")
        more = [further] * max(0, low - 1)
        more += [either(constant(""), further)] * (high - max(low, 1))
        some = sequence(item, *more)
        return some if low else either(constant(""), some)
    rest = {
        "type": "tags_with_separator",
        "tags": [{"type": "tag", "begin": "", "content": item, "end": ""}],
        "separator": joint,
        "at_least_one": low > 0,
        "stop_after_first": False,
    }
    return rest if low < 2 else sequence(*(sequence(item, constant(joint)),) * (low - 1), rest)
