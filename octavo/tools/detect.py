"""Owns which row of the table a model writes in: by an option's name, or by its chat template.

Called once a model by both faces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.marks import Marks
from octavo.tools.reasoning_table import REASONING_FORMATS
from octavo.tools.shapes import ReasoningFormat, ToolFormat
from octavo.tools.table import TOOL_FORMATS

AUTO, NONE = "auto", "none"
_Row = TypeVar("_Row", ToolFormat, ReasoningFormat)


def names_of(rows: tuple[_Row, ...]) -> dict[str, _Row]:
    """Returns the rows by all of their names."""
    return {name: row for row in rows for name in (row.name, *row.aliases)}


TOOL_PARSERS = names_of(TOOL_FORMATS)
REASONING_PARSERS = names_of(REASONING_FORMATS)


def answer_format(
    template: str | None,
    special_tokens: Mapping[str, int],
    *,
    tool_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    token_id: Callable[[str], int | None] = lambda text: None,
) -> AnswerFormat:
    """Returns how a model writes that has this chat template and these special tokens (ids by
    text). Names are those of the table, `auto` or `none`; `token_id` finds the one token of a
    text, if it is one."""
    template = template or ""
    tools = _chosen(TOOL_FORMATS, TOOL_PARSERS, tool_parser, template)
    if tools is None and tool_parser == AUTO:
        tools = TOOL_PARSERS["hermes"]  # what a template that knows no tools is given
    reasoning = _chosen(REASONING_FORMATS, REASONING_PARSERS, reasoning_parser, template)
    texts = () if tools is None else tools.texts
    marks = Marks(special_tokens, texts if reasoning is None else (*texts, *reasoning.texts))
    return AnswerFormat(
        tools=None if tools is None else tools.bound(marks),
        reasoning=None if reasoning is None else reasoning.bound(marks),
        marks=marks,
        row=tools,
        thought_begins=_begins(reasoning, token_id),
        thought_ends=_ends(reasoning, token_id),
    )


def _begins(
    reasoning: ReasoningFormat | None, token_id: Callable[[str], int | None]
) -> dict[int, int | None]:
    if reasoning is None:
        return {}
    if reasoning.tokens is not None:
        before, begin = map(token_id, reasoning.tokens[0])
        return {} if begin is None else {begin: before}
    found = (token_id(text) for text in reasoning.begins)
    return {one: None for one in found if one is not None}


def _ends(
    reasoning: ReasoningFormat | None, token_id: Callable[[str], int | None]
) -> frozenset[int]:
    if reasoning is None:
        return frozenset()
    texts = reasoning.ends if reasoning.tokens is None else reasoning.tokens[1]
    found = (token_id(text) for text in texts)
    return frozenset(one for one in found if one is not None)


def _chosen(
    rows: tuple[_Row, ...], by_name: Mapping[str, _Row], name: str, template: str
) -> _Row | None:
    if name == NONE:
        return None
    if name != AUTO:
        return by_name[name]
    # The template may have a marker in pieces: "<tool_call>" + "\n".
    for row in rows:
        if any(all(text in template for text in group) for group in row.signs):
            return row
    return None
