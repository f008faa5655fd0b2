"""Owns what tools a request has: read, checked, and told to templates, parsers and grammars.

Called by both faces, which so take the same tools and refuse the same ones. Never runs a tool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.errors import RequestError, shown
from octavo.tools.frames import LARK

MAX_TOOLS = 1024
"""Of one request."""
MAX_SCHEMA_DEPTH = 48
NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_.:/-]{0,127}"
"""Of a tool: every format can write it, whatever stands around names there."""
CUSTOM_INPUT = "input"
"""The one parameter that a free-form tool has for the model."""
MAX_GRAMMAR_LENGTH = 65_536
"""Characters of the grammar of a free-form tool's input."""

Kind = Literal["function", "custom"]
Choice = Literal["auto", "none", "required"]

_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
_SCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then")
_SCHEMAS += ("else", "unevaluatedProperties", "unevaluatedItems", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool."""

    name: str
    kind: Kind = "function"
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The schema of its arguments."""
    is_strict: bool = False
    """Whether arguments are held to the schema."""

    def for_template(self) -> dict[str, Any]:
        """Returns the tool as chat templates know tools: a function, whatever it is."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The tools of one request, and whether they are to be called."""

    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    named: tuple[str, ...] = ()
    """Where not empty: only these are called."""
    is_parallel: bool = True
    """Whether one answer may have several calls."""

    def __bool__(self) -> bool:
        return bool(self.tools)

    @property
    def are_called(self) -> bool:
        return bool(self.tools) and self.choice != "none"

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]] | None:
        """The schemas of parameters by name; None if no tool is to be called."""
        return {tool.name: tool.parameters for tool in self.tools} if self.are_called else None

    @property
    def custom_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools if tool.kind == "custom")

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the choice leaves."""
        return tuple(tool for tool in self.tools if not self.named or tool.name in self.named)

    def for_template(self) -> list[dict[str, Any]] | None:
        """Returns all tools, also those that are not to be called: the prompt then has the same
        beginning, whatever is chosen."""
        return [tool.for_template() for tool in self.tools] or None


NO_TOOLS = Tools()


def read_tools(given: object, where: str = "tools") -> Tools:
    """Returns the tools of a request, to be called as the model likes.

    Raises RequestError naming the tool and the field.
    """
    if given is None:
        return NO_TOOLS
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise RequestError(f"{where} must be a list, got {type(given).__name__}", param=where)
    if len(given) > MAX_TOOLS:
        message = f"{where} has {len(given)} tools; at most {MAX_TOOLS} are taken"
        raise RequestError(message, param=where)
    tools = tuple(_tool(one, f"{where}[{place}]") for place, one in enumerate(given))
    places: dict[str, int] = {}
    for place, tool in enumerate(tools):
        first = places.setdefault(tool.name, place)
        if first != place:
            message = (
                f"{where}[{first}] and {where}[{place}] have the same name, {shown(tool.name)}; "
                "give each tool its own"
            )
            raise RequestError(message, param=where)
    return Tools(tools=tools)


def with_choice(tools: Tools, choice: object, is_parallel: bool | None = None) -> Tools:
    """Returns the tools under a `tool_choice`. Raises RequestError."""
    tools = replace(tools, is_parallel=is_parallel is not False)
    if choice is None or choice == "auto":
        return tools
    if choice == "none":
        return replace(tools, choice="none")
    if not tools:
        message = f"tool_choice is {shown(choice)}, but there are no tools; send some"
        raise RequestError(message, param="tool_choice")
    if choice in ("required", "any"):
        return replace(tools, choice="required")
    if not isinstance(choice, Mapping):
        message = (
            "tool_choice must be auto, none, required, or an object that names a tool, got "
            f"{shown(choice)}"
        )
        raise RequestError(message, param="tool_choice")
    if choice.get("type") == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools", choice))
    name = _chosen_name(tools, choice)
    return replace(tools, choice="required", named=(name,))


def _allowed(tools: Tools, allowed: Any) -> Tools:
    where = "tool_choice.allowed_tools"
    listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise RequestError(f"{where}.tools must be a list with a tool in it", param=where)
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise RequestError(f"{where}.mode must be auto or required", param=where)
    return replace(tools, choice=mode, named=tuple(_chosen_name(tools, one) for one in listed))


def _chosen_name(tools: Tools, choice: Any) -> str:
    found = choice
    if isinstance(choice, Mapping):
        inner = choice.get(str(choice.get("type", "function")))
        found = inner.get("name") if isinstance(inner, Mapping) else choice.get("name")
    if found is None:
        message = f"tool_choice must name a tool, got {shown(choice)}"
        raise RequestError(message, param="tool_choice")
    if not any(tool.name == found for tool in tools.tools):
        known = ", ".join(tool.name for tool in tools.tools[:20])
        message = f"tool_choice names {shown(found)}, which is none of the tools; there are {known}"
        raise RequestError(message, param="tool_choice")
    assert isinstance(found, str)
    return found


def _tool(given: object, where: str) -> Tool:
    if not isinstance(given, Mapping):
        message = f"{where} must be an object, got {type(given).__name__}"
        raise RequestError(message, param=where)
    kind = given.get("type", "function")
    if kind not in ("function", "custom"):
        message = (
            f"{where}.type {shown(kind)} is not supported: the server has no tools of its own; "
            "use function or custom"
        )
        raise RequestError(message, param=f"{where}.type", code="unsupported_field")
    inner = given.get(kind)
    place = f"{where}.{kind}"
    if not isinstance(inner, Mapping):
        message = f"{place} must be an object with a name"
        raise RequestError(message, param=place)
    name = inner.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        message = (
            f"{place}.name must be a text of letters, digits, _ . : / - that begins with a letter, "
            f"at most 128 long, got {shown(name)}"
        )
        raise RequestError(message, param=f"{place}.name")
    description = inner.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{place}.description must be a text", param=f"{place}.description")
    strict = inner.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{place}.strict must be true or false", param=f"{place}.strict")
    if kind == "custom":
        return _custom_tool(name, description, inner.get("format"), place)
    return Tool(
        name=name,
        description=description,
        parameters=_parameters(inner.get("parameters"), f"{place}.parameters"),
        is_strict=bool(strict),
    )


def _custom_tool(name: str, description: str | None, given: object, where: str) -> Tool:
    form = _custom_form(given, f"{where}.format")
    parameters = {
        "type": "object",
        "properties": {CUSTOM_INPUT: {"type": "string", **form}},
        "required": [CUSTOM_INPUT],
    }
    return Tool(
        name=name,
        kind="custom",
        description=description,
        parameters=parameters,
        is_strict=bool(form),
    )


def _custom_form(given: object, where: str) -> dict[str, Any]:
    """Returns what a custom tool's format adds to the schema of its input."""
    if given is None:
        return {}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind not in ("text", "grammar"):
        message = f"{where} must be an object of type text or grammar, got {shown(given)}"
        raise RequestError(message, param=where)
    if kind == "text":
        return {}
    # In chats it stands one level deeper than in responses.
    inner = given.get("grammar", given)
    syntax = inner.get("syntax") if isinstance(inner, Mapping) else None
    definition = inner.get("definition") if isinstance(inner, Mapping) else None
    if syntax not in ("lark", "regex"):
        message = f"{where}.syntax must be lark or regex, got {shown(syntax)}"
        raise RequestError(message, param=where)
    if not isinstance(definition, str) or not 0 < len(definition) <= MAX_GRAMMAR_LENGTH:
        message = f"{where}.definition must be a text of 1 to {MAX_GRAMMAR_LENGTH} characters"
        raise RequestError(message, param=where)
    if syntax == "regex":
        return {"pattern": f"^(?:{definition})$"}
    note = f"A text of this grammar, in Lark's form: {definition}"
    return {"description": note, LARK: definition}


def _parameters(given: object, where: str) -> Mapping[str, Any]:
    if given is None or given == {}:
        return {"type": "object", "properties": {}}
    if not isinstance(given, Mapping):
        message = f"{where} must be a JSON schema, got {type(given).__name__}"
        raise RequestError(message, param=where)
    if given.get("type", "object") != "object":
        message = f"{where}.type must be object, got {shown(given['type'])}: arguments have names"
        raise RequestError(message, param=f"{where}.type")
    _check_schema(given, where, 0)
    return given


def _check_schema(schema: object, where: str, depth: int) -> None:
    """Raises RequestError for what is no JSON schema, as far as anything here depends on it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        message = f"{where} must be a JSON schema, got {shown(schema)}"
        raise RequestError(message, param=where)
    if depth == MAX_SCHEMA_DEPTH:
        message = f"{where} is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter"
        raise RequestError(message, param=where)
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _TYPES:
            message = f"{where}.type must be one of {', '.join(sorted(_TYPES))}, got {shown(kind)}"
            raise RequestError(message, param=f"{where}.type")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        message = f"{where}.required must be a list of names, got {shown(required)}"
        raise RequestError(message, param=f"{where}.required")
    for name in ("enum", *_LISTS):
        if name in schema and not isinstance(schema[name], list):
            message = f"{where}.{name} must be a list, got {shown(schema[name])}"
            raise RequestError(message, param=f"{where}.{name}")
    for name in _MAPS:
        if name in schema and not isinstance(schema[name], Mapping):
            message = f"{where}.{name} must be an object, got {shown(schema[name])}"
            raise RequestError(message, param=f"{where}.{name}")
    for place, inner in _inner_schemas(schema, where):
        _check_schema(inner, place, depth + 1)


def _inner_schemas(schema: Mapping[str, Any], where: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in _SCHEMAS:
        inner = schema.get(name)
        if isinstance(inner, list):  # items of older drafts
            found += [(f"{where}.{name}[{place}]", one) for place, one in enumerate(inner)]
        elif inner is not None:
            found.append((f"{where}.{name}", inner))
    for name in _LISTS:
        found += [
            (f"{where}.{name}[{place}]", one) for place, one in enumerate(schema.get(name, ()))
        ]
    for name in _MAPS:
        found += [(f"{where}.{name}.{key}", one) for key, one in schema.get(name, {}).items()]
    return found
