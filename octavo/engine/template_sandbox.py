"""The sandbox that chat templates run in: Jinja's own, with limits on what a rendering takes.

Made by `chat_template.ChatTemplate`. Never knows messages: templates come with models from
anywhere, and numbers in them from clients, so that no loop and no text may grow without bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jinja2.runtime
import jinja2.sandbox

MAX_TEXT = 1 << 24
"""Characters, or items of a list, that one operation of a template may make."""
MAX_STEPS = 1_000_000
"""Items of all `range`s of one rendering together."""
MAX_DEPTH = 100
"""Levels of nesting in what a template gets."""
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5,})")


class TemplateLimitError(jinja2.TemplateError):
    """A template made, or was about to make, more than it may."""


class BoundedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses operations that make more out of less: repeating, padding, powers."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            for one, count in ((left, right), (right, left)):
                if isinstance(one, Sized) and isinstance(count, int):
                    check_size(len(one) * count)
        elif operator == "+":
            if isinstance(left, Sized) and isinstance(right, Sized):
                check_size(len(left) + len(right))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                check_size(left.bit_length() * abs(right))
        elif isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise TemplateLimitError("a format pads to a width that no prompt needs")
        return super().call_binop(context, operator, left, right)

    def call(
        __self,  # noqa: N805 - as jinja2 has it: templates may name an argument "self"
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        owner = __obj.__self__ if isinstance(__obj, type("".join)) else None
        if isinstance(owner, str):
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, int):
                    check_size(abs(argument))
                elif isinstance(argument, str) and __obj.__name__ == "replace":
                    check_size((len(owner) + 1) * len(argument))
        return super().call(__context, __obj, *args, **kwargs)


def check_size(size: int) -> None:
    """Raises TemplateLimitError where `size` is more than one operation may make."""
    if size > MAX_TEXT:
        raise TemplateLimitError(f"one operation would make more than {MAX_TEXT:,} characters")


def counted_range() -> Callable[..., range]:
    """Returns a `range` for one rendering: all that it makes together have a limit."""
    left = MAX_STEPS

    def bounded(*arguments: int) -> range:
        nonlocal left
        made = range(*arguments)
        left -= len(made) if left >= 0 else 0
        if left < 0:
            raise TemplateLimitError(f"its loops have more than {MAX_STEPS:,} steps")
        return made

    return bounded


def joined(pieces: Iterable[str], limit: int) -> str:
    """Returns the rendered pieces as one text of at most `limit` characters."""
    found: list[str] = []
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise TemplateLimitError("it makes far more text than the messages have")
        found.append(piece)
    return "".join(found)
