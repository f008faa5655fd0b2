"""Structural tags to a grammar: free text with bound parts, in the two forms that are in use.

Called by `sources`. The older form is `{"structures": [{begin, schema, end}], "triggers": [...]}`,
the newer `{"format": {"type": ...}}` of nested nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError, shown
from octavo.grammar.json_quoted import quoted_lark
from octavo.grammar.lark import LarkWriter, as_lark
from octavo.grammar.schema import fit_schema

MAX_DEPTH = 32

Node = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """`begin`, then a piece of grammar, then `end`."""

    begin: str
    body: str
    end: str


def write_structural_tag(writer: LarkWriter, tag: Node) -> str:
    """Returns the body of a rule. Raises RequestError with the place that cannot be read."""
    if "format" in tag:
        return _Reader(writer).read(tag["format"], "format", 0)
    structures = _field(tag, "structures", list, "structural_tag")
    tags = [
        Tag(
            begin=_field(one, "begin", str, f"structures[{place}]"),
            body=writer.schema(fit_schema(one.get("schema", {}))),
            end=_field(one, "end", str, f"structures[{place}]"),
        )
        for place, one in enumerate(structures)
    ]
    triggers = _field(tag, "triggers", list, "structural_tag")
    return triggered(writer, triggers, tags)


def triggered(
    writer: LarkWriter,
    triggers: Sequence[str],
    tags: Sequence[Tag],
    *,
    is_needed: bool = False,
    is_last: bool = False,
) -> str:
    """Returns free text in which a trigger begins one of the tags that start with it.

    `is_needed`: at least one comes. `is_last`: nothing comes after the first.
    """
    if not tags or not triggers or not all(isinstance(one, str) and one for one in triggers):
        raise _refused("triggers", "and the tags must be lists with something in them")
    options = []
    for tag in tags:
        trigger = next((one for one in triggers if tag.begin.startswith(one)), None)
        if trigger is None:
            raise _refused("triggers", f"has none that begins {shown(tag.begin)}")
        head, end = writer.text_until(trigger), writer.literal(tag.end)
        options.append(f"{head} {writer.literal(tag.begin[len(trigger) :])} {tag.body} {end}")
    one = writer.either(options)
    if is_last:
        return one if is_needed else f"({one} | {writer.any_text()})"
    return f"{one}{'+' if is_needed else '*'} {writer.any_text()}"


class _Reader:
    """Reads nodes of the newer form."""

    def __init__(self, writer: LarkWriter) -> None:
        self._writer = writer
        self._kinds: Mapping[str, Callable[[Node, str, int], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "grammar": self._grammar,
            "any_text": lambda node, place, depth: self._writer.any_text(),
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def read(self, node: Any, place: str, depth: int) -> str:
        if not isinstance(node, Mapping) or depth > MAX_DEPTH:
            raise _refused(place, f"must be an object, nested at most {MAX_DEPTH} deep")
        kind = self._kinds.get(_field(node, "type", str, place))
        if kind is None:
            known = ", ".join(self._kinds)
            raise _refused(f"{place}.type", f"is {shown(node['type'])}; known are {known}")
        return kind(node, place, depth)

    def _const_string(self, node: Node, place: str, depth: int) -> str:
        return self._writer.literal(_field(node, "value", str, place))

    def _json_schema(self, node: Node, place: str, depth: int) -> str:
        return self._writer.schema(fit_schema(node.get("json_schema", {})))

    def _regex(self, node: Node, place: str, depth: int) -> str:
        return self._writer.regex(_field(node, "pattern", str, place))

    def _grammar(self, node: Node, place: str, depth: int) -> str:
        lark = as_lark(_field(node, "grammar", str, place))
        return self._writer.grammar(quoted_lark(lark) if node.get("is_quoted") is True else lark)

    def _sequence(self, node: Node, place: str, depth: int) -> str:
        return self._writer.rule(" ".join(self._elements(node, place, depth)))

    def _or(self, node: Node, place: str, depth: int) -> str:
        return self._writer.either(self._elements(node, place, depth))

    def _elements(self, node: Node, place: str, depth: int) -> list[str]:
        elements = _field(node, "elements", list, place)
        if not elements:
            raise _refused(f"{place}.elements", "is empty")
        return [
            self.read(one, f"{place}.elements[{number}]", depth + 1)
            for number, one in enumerate(elements)
        ]

    def _tag(self, node: Node, place: str, depth: int) -> str:
        writer = self._writer
        begin, end = _field(node, "begin", str, place), _field(node, "end", str, place)
        content = node.get("content")
        if end and isinstance(content, Mapping) and content.get("type") == "any_text":
            return f"{writer.literal(begin)} {writer.text_until(end)}"
        if end and isinstance(content, Mapping) and content.get("is_lazy") is True:
            pattern = _field(content, "pattern", str, f"{place}.content")
            return f"{writer.literal(begin)} {writer.text_until(end, writer.regex(pattern))}"
        body = self.read(content, f"{place}.content", depth + 1)
        return writer.rule(f"{writer.literal(begin)} {body} {writer.literal(end)}")

    def _triggered_tags(self, node: Node, place: str, depth: int) -> str:
        tags = [
            Tag(
                begin=_field(one, "begin", str, f"{place}.tags[{number}]"),
                body=self.read(one.get("content"), f"{place}.tags[{number}].content", depth + 1),
                end=_field(one, "end", str, f"{place}.tags[{number}]"),
            )
            for number, one in enumerate(_field(node, "tags", list, place))
        ]
        return triggered(
            self._writer,
            _field(node, "triggers", list, place),
            tags,
            is_needed=node.get("at_least_one") is True,
            is_last=node.get("stop_after_first") is True,
        )

    def _tags_with_separator(self, node: Node, place: str, depth: int) -> str:
        tags = _field(node, "tags", list, place)
        if not tags:
            raise _refused(f"{place}.tags", "is empty")
        one = self._writer.either(
            self._tag(tag, f"{place}.tags[{number}]", depth + 1) for number, tag in enumerate(tags)
        )
        body = one
        if node.get("stop_after_first") is not True:
            separator = self._writer.literal(_field(node, "separator", str, place))
            body = f"{one} ({separator} {one})*"
        return body if node.get("at_least_one") is True else f"({body})?"


def _field(node: Any, name: str, kind: type, place: str) -> Any:
    value = node.get(name) if isinstance(node, Mapping) else None
    if not isinstance(value, kind):
        wanted = {"str": "a text", "list": "a list"}[kind.__name__]
        raise _refused(f"{place}.{name}", f"must be {wanted}, got {shown(value)}")
    return value


def _refused(place: str, reason: str) -> RequestError:
    param = "structured_outputs.structural_tag"
    return RequestError(f"structural_tag: {place} {reason}", param=param)
