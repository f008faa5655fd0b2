"""Owns how an answer is read: reasoning, content and calls, as its text comes.

Made by both faces for every sequence of a chat whose model has a format; fed with the detokeniser's
text, in which marks stand for special tokens. Never looks at a whole answer: what a stream tells
and what an answer tells are the same pieces.

    content <-> reasoning      at the markers of reasoning
    content, reasoning -> call at the markers of calls, and back behind the last one
    what turns out to be no call is content (or reasoning) from its marker on, and is read as such
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.tools.calls import Calls, Piece, TextPiece
from octavo.tools.harmony import Harmony
from octavo.tools.marks import Marks
from octavo.tools.reasoning_tokens import NO_THOUGHT, ReasoningTokens, Thought
from octavo.tools.shapes import ReasoningFormat, ToolFormat
from octavo.tools.source import BrokenCallError, Markers, Source, Step

Kind = Literal["content", "reasoning"]
_ALPHANUMERIC = string.ascii_letters + string.digits
_TAIL = 64
"""Characters of a prompt in which a template may have begun or ended the reasoning."""
_JUNK = " \t\r\n}]"
"""What may be left of a call that was closed too often."""
_BRACKETS = ("{", "[")
_BARE_ENDS = ("```", "</tools>", ",", ";")
"""What may stand behind calls that have no marker."""
_SEPARATORS = Markers((",", ";"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How one model writes, bound to its tokenizer. Shared by all its answers."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    marks: Marks
    row: ToolFormat | None = None
    """That of the table, without marks: how calls are written that an output is held to."""
    thought_begins: Mapping[int, int | None] = field(default_factory=dict)
    """Token ids that begin the reasoning, each with the one that must stand before it, if any."""
    thought_ends: frozenset[int] = frozenset()
    markers: _FormatMarkers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "markers", _FormatMarkers(self.tools, self.reasoning))

    @property
    def is_in_channels(self) -> bool:
        """Whether the whole answer is in channels, so that no text is plain."""
        return self.tools is not None and self.tools.shape is None

    def without_reasoning(self) -> AnswerFormat:
        """Returns the same for answers in which the reasoning stays content."""
        return replace(self, reasoning=None, thought_begins={}, thought_ends=frozenset())

    def token_counter(self, starts_inside: bool) -> ReasoningTokens:
        """Returns what counts the tokens of one answer's reasoning."""
        return ReasoningTokens(self.thought_begins, self.thought_ends, starts_inside=starts_inside)

    def thought_before(self, prompt: str) -> Thought:
        """Returns the reasoning that stands before the answer to `prompt`, or may stand there."""
        if self.reasoning is None or not self.thought_ends:
            return NO_THOUGHT
        tail = self.marks.bind(prompt[-_TAIL:]).rstrip()
        if self.reasoning.ends and tail.endswith(self.reasoning.ends):
            return NO_THOUGHT
        firsts = (one if before is None else before for one, before in self.thought_begins.items())
        return Thought(
            begins=tuple(sorted(firsts)),
            ends=tuple(sorted(self.thought_ends)),
            starts_inside=self.starts_inside(prompt),
        )

    def starts_inside(self, prompt: str) -> bool:
        """Whether the answer to `prompt`, the text of a chat, begins within the reasoning."""
        if self.reasoning is None:
            return False
        return self.reasoning.is_inside(self.marks.bind(prompt[-_TAIL:]))


class _FormatMarkers:
    """What is looked for in each state."""

    def __init__(self, tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> None:
        calls = () if tools is None else (*tools.begins, *tools.opens)
        thought = () if reasoning is None else reasoning.ends
        drops = () if tools is None else tools.drops
        drops = drops if reasoning is None else (*drops, *reasoning.drops)
        self.thinking = Markers(() if reasoning is None else reasoning.begins)
        self.drops = Markers(drops)
        self.calls = Markers(calls)
        self.bare = Markers(() if tools is None else tools.bare)
        self.bare_ends = Markers(() if tools is None else (*tools.closes, *tools.ends, *_BARE_ENDS))
        self.opens = Markers(() if tools is None else tools.opens)
        self.closes = Markers(() if tools is None else tools.closes)
        self.ends = Markers(() if tools is None else tools.ends)
        ends_of_calls = () if tools is None else (*tools.closes, *tools.ends)
        self.terminators = Markers(ends_of_calls or calls)
        self.whatever_follows = Markers((*ends_of_calls, *calls))
        self.in_kind: dict[tuple[Kind, bool], Markers] = {
            ("content", False): Markers(drops),
            ("content", True): Markers((*drops, *calls)),
            ("reasoning", False): Markers(thought),
            ("reasoning", True): Markers((*thought, *calls)),
        }


class AnswerParser:
    """One answer. `push` text as it comes, then `finish`; both return what is new."""

    __slots__ = ("_calls", "_format", "_has_tools", "_pieces", "_run", "_source", "_text")

    def __init__(
        self,
        answer_format: AnswerFormat,
        *,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        starts_inside: bool = False,
    ) -> None:
        """`schemas`: those of the tools' parameters by name, None if calls are not looked for.

        `starts_inside`: whether the prompt has begun the reasoning.
        """
        self._format = answer_format
        self._has_tools = schemas is not None and answer_format.tools is not None
        self._pieces: list[Piece] = []
        self._source = Source()
        ids = "call" if answer_format.tools is None else answer_format.tools.ids
        self._calls = Calls(self._source, schemas or {}, self._tell, _NEW_IDS[ids])
        kind: Kind = "reasoning" if starts_inside else "content"
        self._text = _Text(self._tell, kind, holds_space=self._has_tools)
        tools = answer_format.tools
        grammar = self._harmony() if tools is not None and tools.shape is None else self._answer()
        self._run: Generator[None, None, None] | None = grammar
        next(grammar)

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._text.kind == "reasoning"

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls

    def push(self, text: str) -> list[Piece]:
        """Returns what `text` adds."""
        if not text:
            return []
        self._source.feed(text)
        return self._advance()

    def finish(self, *, is_cut: bool = False) -> list[Piece]:
        """Returns what was held back; `is_cut` if there was no room for the rest."""
        self._source.end(is_cut=is_cut)
        pieces = self._advance()
        assert self._run is None, "a grammar ends with its text"
        return pieces

    def _advance(self) -> list[Piece]:
        assert self._run is not None, "nothing comes behind the end"
        try:
            next(self._run)
        except StopIteration:
            self._run = None
            self._text.finish()
        pieces = self._pieces[:]
        self._pieces.clear()
        return pieces

    def _tell(self, piece: Piece) -> None:
        show = self._format.marks.show
        if isinstance(piece, TextPiece):
            self._pieces.append(TextPiece(piece.kind, show(piece.text)))
        else:
            shown = show(piece.arguments)
            self._pieces.append(piece._replace(arguments=shown, name=show(piece.name)))

    def _emit_as(self, kind: Kind) -> Callable[[str], None]:
        if kind != self._text.kind:
            self._text.turn(kind)
        return self._text.add

    def _harmony(self) -> Step[None]:
        yield
        calls = self._calls if self._has_tools else None
        yield from Harmony(self._format.marks).read(self._source, calls, self._emit_as)  # type: ignore[arg-type]

    def _answer(self) -> Step[None]:
        yield
        source, text, markers = self._source, self._text, self._format.markers
        may_think = may_be_bare = True
        if text.kind == "reasoning":
            yield from self._begin_reasoning()  # the marker may come though the prompt has it
        while (yield from source.more()):
            if text.kind == "content" and may_think:
                yield from self._begin_reasoning()
            if may_be_bare and text.kind == "content":
                may_be_bare = False
                yield from self._bare_calls()
            may_think = False
            found = yield from source.until(markers.in_kind[text.kind, self._has_tools], text.add)
            if not found:
                return
            if found in markers.calls:
                num_before = self._calls.num_calls
                yield from self._section(found)
                may_think = self._calls.num_calls > num_before
            else:
                text.turn("content")

    def _begin_reasoning(self) -> Step[None]:
        """Reads white space and a marker of reasoning, if that is what comes."""
        source = self._source
        source.keep()
        yield from source.skip_space()
        if (yield from source.accept(self._format.markers.thinking)):
            source.release()
            self._text.turn("reasoning")
        else:
            source.go_back()

    def _bare_calls(self) -> Step[None]:
        """Reads calls without a marker, at the start of an answer."""
        tools, source, calls = self._format.tools, self._source, self._calls
        starts = self._format.markers.bare
        if tools is None or not self._has_tools or not starts.texts:
            return
        num_before = -1
        while calls.num_calls > num_before:
            num_before = calls.num_calls
            source.keep()
            yield from source.skip_space()
            start = yield from source.accept(starts)
            if not start:
                source.go_back()
                return
            if start in _BRACKETS:
                source.unread(len(start))
            calls.must_be_known = True
            yield from self._calls_of(tools, "", is_bare=True)
            calls.must_be_known = False

    def _section(self, marker: str) -> Step[None]:
        """Reads the calls that begin with `marker`."""
        tools = self._format.tools
        assert tools is not None, "only calls have these markers"
        self._source.keep(len(marker))
        yield from self._calls_of(tools, marker)

    def _calls_of(self, tools: ToolFormat, marker: str, *, is_bare: bool = False) -> Step[None]:
        assert tools.shape is not None, "answers in channels have no markers of calls"
        source, calls, markers = self._source, self._calls, self._format.markers
        num_before = calls.num_calls
        opened = marker if marker in markers.opens or not tools.opens else ""
        has_begun = is_bare or not tools.opens
        while True:
            try:
                if not opened and not has_begun:
                    yield from source.skip_space()
                    if not source.is_kept:
                        source.keep()
                    opened = yield from source.accept(markers.opens)
                    if not opened:
                        if calls.num_calls == num_before:
                            raise BrokenCallError
                        source.release()
                        break
                yield from tools.shape.read(source, calls, markers.terminators)
                if source.is_kept:
                    raise BrokenCallError  # nothing was called
            except BrokenCallError:
                yield from self._give_back(marker or opened)
                return
            calls.end()
            self._text.cut()
            if is_bare:
                source.release()
                yield from source.skip_space()
                yield from source.accept(markers.bare_ends)
                return
            if not (yield from self._close()):
                return
            if has_begun:
                break
            opened = ""
        yield from source.skip_space()
        yield from source.accept(markers.ends)

    def _close(self) -> Step[bool]:
        """Reads up to what closes a call; returns whether more calls may follow at once."""
        source, markers = self._source, self._format.markers
        source.release()
        yield from source.skip_space()
        if not markers.closes.texts:
            yield from source.accept(_SEPARATORS)
            return True
        while (yield from source.more()):
            found = yield from source.accept(markers.terminators)
            if not found and (yield from source.peek()) in _JUNK:
                source.take(1)
                continue
            if not found:
                found = yield from source.until(markers.whatever_follows, self._text.add)
            if found in markers.closes:
                return True
            source.unread(len(found))
            return found in markers.ends
        return True

    def _give_back(self, marker: str) -> Step[None]:
        """What looked like a call is text: its marker goes out, and the rest is read again."""
        self._source.go_back()
        if (yield from self._source.more()):
            is_there = bool(marker) and self._source.rest.startswith(marker)
            self._text.add(self._source.take(len(marker) if is_there else 1))


class _Text:
    """The content and the reasoning, without the white space around them.

    White space at the end is held back until it is known what follows: before a call or the end
    of the reasoning it goes away, at the end of an answer it stays.
    """

    __slots__ = ("_has_text", "_held", "_holds_space", "_tell", "_trims", "kind")

    def __init__(self, tell: Callable[[Piece], None], kind: Kind, holds_space: bool) -> None:
        self._tell = tell
        self.kind: Kind = kind
        self._holds_space = holds_space
        self._trims = kind == "reasoning"
        self._held = ""

    def add(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
            if not text:
                return
            self._trims = False
        if self._holds_space or self.kind == "reasoning":
            text = self._held + text
            kept = text.rstrip()
            self._held = text[len(kept) :]
            text = kept
        if text:
            self._tell(TextPiece(self.kind, text))

    def cut(self) -> None:
        """A call came: white space before and behind it goes away."""
        self._held, self._trims = "", True

    def turn(self, kind: Kind) -> None:
        """What follows is of another kind."""
        self.cut()
        self.kind = kind

    def finish(self) -> None:
        if self._held and self.kind == "content":
            self._tell(TextPiece("content", self._held))
        self._held = ""


def _call_id(name: str, index: int) -> str:
    return f"call_{secrets.token_hex(12)}"


def _alphanumeric_id(name: str, index: int) -> str:
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def _kimi_id(name: str, index: int) -> str:
    return f"functions.{name}:{index}"


_NEW_IDS = {"call": _call_id, "alphanumeric": _alphanumeric_id, "kimi": _kimi_id}
