"""Owns which row of the table a model writes in: by an option's name, or by its chat template.

Called once a model by both faces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.marks import Marks
from octavo.tools.shapes import ReasoningFormat, ToolFormat
from octavo.tools.table import REASONING_FORMATS, TOOL_FORMATS

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
) -> AnswerFormat:
    """Returns how a model writes that has this chat template and these special tokens (ids by
    text). Names are those of the table, `auto` or `none`."""
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
    )


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
