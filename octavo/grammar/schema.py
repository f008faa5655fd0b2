"""A JSON schema made fit for the library: what it would get wrong is refused or rewritten here.

Called by `sources`. Pure functions over parsed JSON; knows nothing of the library but its gaps:
it counts a key twice where an object has it twice, lets seconds be 60 and any February have 29
days, and finds out only while generating that a schema has no finite instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from octavo.errors import RequestError

Schema = dict[str, Any] | bool

MAX_DEPTH = 64
"""Of schemas within schemas."""
MAX_FREE_PROPERTIES = 400
"""Of one object, that need not come."""
MAX_REPEATS = 100_000
"""Highest count in a schema (items, characters, properties) that is taken: a sequence is shorter
than that anyway."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = (
    *("items", "additionalItems", "additionalProperties", "not", "if", "then", "else"),
    *("contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
_COUNTS = (
    *("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"),
    *("minContains", "maxContains"),
)
_OBJECT_KEYS = ("properties", "patternProperties", "required", "additionalProperties")

_HOUR, _SIXTY = "(?:[01][0-9]|2[0-3])", "[0-5][0-9]"
_TIME = rf"{_HOUR}:{_SIXTY}:{_SIXTY}(?:\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_HOUR}:{_SIXTY})"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ANY_YEAR = (
    "[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
_DATE = f"(?:{_ANY_YEAR}|{_LEAP_YEAR})"
_SPANS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[Tt]{_TIME}$",
    "email": rf"^[^@]{{1,64}}@{_LABEL}(?:\.{_LABEL}){{0,2}}$",
}
"""Beside the library's own form of these: February has 29 days in leap years alone, seconds end at
59, addresses have the lengths that readers take."""
_STANDARD_FORMATS = frozenset(
    {
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname"),
        *("idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid"),
        *("uri-template", "json-pointer", "relative-json-pointer", "regex"),
    }
)
"""Other names are notes to the reader, which no validator checks."""


def fit_schema(schema: Schema, *, closes_objects: bool = False) -> Schema:
    """Returns an equivalent schema that the library holds to exactly, or refuses with a reason.

    `closes_objects`: objects have no properties but those that it names. Raises RequestError.
    """
    if schema is False:
        raise _refused("", "is false: nothing fits it")
    if not has_instance(schema):
        raise _refused("", "has no finite instance: whatever fits it must contain itself")
    return _fit(schema, "", 0, closes_objects)


def _refused(path: str, reason: str) -> RequestError:
    where = f"the schema at #{path}" if path else "the schema"
    return RequestError(f"{where} {reason}", param="structured_outputs.json")


def _fit(schema: Any, path: str, depth: int, closes_objects: bool) -> Schema:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise _refused(path, f"must be an object or a boolean, got {type(schema).__name__}")
    if depth > MAX_DEPTH:
        raise _refused(path, f"is nested deeper than {MAX_DEPTH} schemas")
    _check_counts(schema, path)
    _check_min_properties(schema, path)
    _check_free_properties(schema, path)
    fitted = _map_parts(
        schema, lambda part, at: _fit(part, f"{path}/{at}", depth + 1, closes_objects)
    )
    is_object = schema.get("type") == "object" or any(key in schema for key in _OBJECT_KEYS)
    if closes_objects and is_object and "additionalProperties" not in schema:
        fitted["additionalProperties"] = False
    name = schema.get("format")
    if isinstance(name, str) and name not in _STANDARD_FORMATS:
        del fitted["format"]
    elif isinstance(name, str) and (span := _SPANS.get(name)) is not None:
        fitted = (
            {"allOf": [fitted, {"pattern": span}]}
            if "pattern" in schema
            else {
                **fitted,
                "pattern": span,
            }
        )
    return fitted


def _check_counts(schema: dict[str, Any], path: str) -> None:
    for name in _COUNTS:
        value = schema.get(name)
        if isinstance(value, int | float) and not 0 <= value <= MAX_REPEATS:
            raise _refused(path, f"has {name} {value}; 0 to {MAX_REPEATS} is taken")


def _check_min_properties(schema: dict[str, Any], path: str) -> None:
    """An object may repeat a key that only a pattern names, and then has fewer than it shows."""
    least = schema.get("minProperties", 0)
    required = schema.get("required")
    num_sure = len(set(required)) if isinstance(required, list) else 0
    is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if isinstance(least, int | float) and least > max(num_sure, 1) and not is_closed:
        reason = (
            f"has minProperties {least}, which holds only with additionalProperties false, or "
            "with as many names in required"
        )
        raise _refused(path, reason)


def _check_free_properties(schema: dict[str, Any], path: str) -> None:
    """Wherever one of them may come, all that may be left out are ways to go on."""
    properties, required = schema.get("properties"), schema.get("required")
    sure = required if isinstance(required, list) else []
    if isinstance(properties, dict) and len(properties) - len(sure) > MAX_FREE_PROPERTIES:
        reason = (
            f"has {len(properties)} properties, {len(sure)} of them required; at most "
            f"{MAX_FREE_PROPERTIES} may be left out, so require some, or nest them"
        )
        raise _refused(path, reason)


def _map_parts(schema: dict[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Returns a copy whose own subschemas are changed; all else is data."""
    copy = dict(schema)
    for key, name, part in _parts(schema):
        if name is None:
            copy[key] = change(part, key)
        else:
            if copy[key] is schema[key]:
                copy[key] = schema[key].copy()
            copy[key][name] = change(part, f"{key}/{name}")
    return copy


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields subschemas with their key, and their place in its value where that holds several."""
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            yield from ((key, name, part) for name, part in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from ((key, place, part) for place, part in enumerate(value))
        elif key in _SINGLES:
            yield key, None, value


def has_instance(schema: Schema) -> bool:
    """Returns whether some finite value can fit, as far as required parts decide it.

    The least fixed point over the targets of `$ref`: none has an instance until one is shown. What
    waited for it is looked at again then, and nothing else, so that long chains take no time.
    """
    search = _InstanceSearch(schema)
    while True:
        if search.has_instance(schema, "#"):
            return True
        if not search.todo:
            return False
        pointer = search.todo.pop()
        if search.has_instance(resolve(schema, pointer), pointer):
            search.known.add(pointer)
            search.todo += search.waiting.pop(pointer, ())


class _InstanceSearch:
    """Which targets of `$ref` have an instance, and which wait for others to have one."""

    def __init__(self, root: Schema) -> None:
        self.known: set[str] = set()
        self.waiting: dict[str, list[str]] = {}
        """By pointer: those whose targets may have an instance once its target has."""
        self.todo: list[str] = []
        self._root = root

    def has_instance(self, schema: Any, asker: str) -> bool:
        """Returns whether `schema`, the target of `asker`, has one, as far as is known."""
        return self._has(schema, asker, 0)

    def _has(self, schema: Any, asker: str, depth: int) -> bool:
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return True  # the library, or `_fit`, has its own word on it
        go = lambda part: self._has(part, asker, depth + 1)
        pointer = schema.get("$ref")
        if isinstance(pointer, str) and pointer.startswith("#") and not self._is_known(pointer):
            self.waiting[pointer].append(asker)
            return False
        for key in ("anyOf", "oneOf"):
            options = schema.get(key)
            if isinstance(options, list) and options and not any(go(one) for one in options):
                return False
        everything = schema.get("allOf")
        if isinstance(everything, list) and not all(go(one) for one in everything):
            return False
        if "enum" in schema or "const" in schema:
            return True
        kinds = schema.get("type")
        return (kinds not in ("object", ["object"]) or _has_finite_object(schema, go)) and (
            kinds not in ("array", ["array"]) or _has_finite_array(schema, go)
        )

    def _is_known(self, pointer: str) -> bool:
        if pointer in self.known:
            return True
        if resolve(self._root, pointer) is None:
            return True  # what is not there is the library's to refuse
        if pointer not in self.waiting:
            self.waiting[pointer] = []
            self.todo.append(pointer)
        return False


def _has_finite_object(schema: Mapping[str, Any], go: Callable[[Any], bool]) -> bool:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    return all(go(properties[name]) for name in required if name in properties)


def _has_finite_array(schema: Mapping[str, Any], go: Callable[[Any], bool]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, int | float) or least < 1:
        return True
    first, rest = schema.get("prefixItems"), schema.get("items")
    if isinstance(rest, list):
        first, rest = rest, schema.get("additionalItems")
    needed = first[: int(least)] if isinstance(first, list) else []
    if len(needed) < least:
        needed = [*needed, rest]
    return all(go(part) for part in needed)


def resolve(root: Schema, pointer: str) -> Any:
    """Returns what a local JSON pointer (`#/a/b`) names, None if there is no such thing."""
    found: Any = root
    if pointer in ("#", "#/"):
        return root
    if not pointer.startswith("#/"):
        return None
    for step in pointer[2:].split("/"):
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found
