"""What a row of the table says: how a family of models writes calls and reasoning.

`table` has the rows, `answer_parser` reads answers by them, a grammar is built from them. Strings
are texts of the format; those that a tokenizer has as special tokens are looked for as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from octavo.tools.calls import Calls
from octavo.tools.frames import Frame
from octavo.tools.marks import Marks
from octavo.tools.source import Markers, Source, Step


class Shape(Protocol):
    """The grammar of what stands between the marker of a call and what closes it."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Markers within a call."""
        ...

    def bound(self, marks: Marks) -> Shape:
        """Returns the same with marks in place of special tokens."""
        ...

    def frame(self, name: str, schema: Mapping[str, Any]) -> Frame:
        """Returns how a call of a tool is written that an output is held to."""
        ...

    def read(self, source: Source, calls: Calls, closes: Markers) -> Step[None]:
        """Reads what is behind the marker. Raises BrokenCallError before a call is announced;
        once one is, whatever follows is read without an error."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model writes what `ToolFormat` reads, to the letter: its spaces, too."""

    begin: str = ""
    """Before the first of several calls."""
    open: str = ""
    close: str = ""
    end: str = ""
    joint: str = ""
    """Between two calls."""
    is_single: bool = False
    """Whether an answer has one call at most."""
    behind_thought: str = ""
    """Between the reasoning and the first call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How calls stand in an answer: `begins (opens CALL closes)* ends`."""

    name: str
    """As vLLM's `--tool-call-parser` has it."""
    shape: Shape | None
    """None: the whole answer is in channels (`harmony`)."""
    begins: tuple[str, ...] = ()
    """Before the first of several calls."""
    opens: tuple[str, ...] = ()
    """Before each call; calls without one are told from text by their tool's name alone."""
    closes: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    """Behind the last call."""
    drops: tuple[str, ...] = ()
    """Markers around the content that are no part of it."""
    bare: tuple[str, ...] = ()
    """What calls may begin with at the start of an answer, without a marker: a bracket, which is
    part of the call, or a text before it. Only tools that the request has are called so."""
    layout: Layout | None = None
    """How calls are written that an output is held to; None if it cannot be."""
    written_shape: Shape | None = None
    """The same of a call, where `shape` is none."""
    ids: Literal["call", "alphanumeric", "kimi"] = "call"
    """The manner of ids."""
    signs: tuple[tuple[str, ...], ...] = ()
    """A chat template that has all texts of one of these groups is of this format."""
    aliases: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        inner = () if self.shape is None else self.shape.texts
        return (*self.begins, *self.opens, *self.closes, *self.ends, *self.drops, *inner)

    def bound(self, marks: Marks) -> ToolFormat:
        """Returns the same with marks in place of special tokens."""
        shape = None if self.shape is None else self.shape.bound(marks)
        return replace(
            _bound(self, marks, "begins", "opens", "closes", "ends", "drops"), shape=shape
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """What stands around the reasoning of an answer."""

    name: str
    """As vLLM's `--reasoning-parser` has it."""
    begins: tuple[str, ...] = ("<think>",)
    ends: tuple[str, ...] = ("</think>",)
    drops: tuple[str, ...] = ()
    """Markers around the content that are no part of it."""
    starts_inside: bool = False
    """Whether an answer begins within the reasoning, unless the prompt has ended it."""
    tokens: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Where it is not one of `begins` and `ends` alone: the tokens, one behind the other, that
    begin the reasoning, and those of which one ends it."""
    signs: tuple[tuple[str, ...], ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.begins, *self.ends, *self.drops)

    def bound(self, marks: Marks) -> ReasoningFormat:
        return _bound(self, marks, "begins", "ends", "drops")

    def is_inside(self, prompt: str) -> bool:
        """Whether the answer to `prompt`, the text of a chat, begins within the reasoning."""
        end = prompt.rstrip()
        if self.begins and end.endswith(self.begins):
            return True
        return self.starts_inside and not end.endswith(self.ends)


_Format = TypeVar("_Format", ToolFormat, ReasoningFormat)


def _bound(row: _Format, marks: Marks, *names: str) -> _Format:
    found: Mapping[str, Any] = {name: tuple(map(marks.bind, getattr(row, name))) for name in names}
    return replace(row, **found)
