"""Owns the Jinja side of chat: messages and a model's template become one prompt text, in which
what the user wrote can be told from what the template wrote.

Called by `Tokenizer.encode_chat`. Never tokenises, and never runs a template outside Jinja's
immutable sandbox, since templates come with models from anywhere.

What templates may use besides Jinja itself is what `transformers` gives them: raise_exception,
strftime_now, a `tojson` that does not escape HTML, break and continue, and the generation tag.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from octavo.engine.late_system import as_users_words, has_late_system, keeps_late_system
from octavo.engine.plain_tools import with_calls_as_text, with_tools
from octavo.engine.template_json import to_json
from octavo.engine.template_sandbox import MAX_DEPTH, BoundedSandbox, counted_range, joined
from octavo.engine.tool_messages import CallArguments
from octavo.errors import ChatTemplateError

Message = Mapping[str, Any]

# Put behind the message to continue, to find its end in the rendered text. A template that trims
# its messages drops the space at the end, and with it tells that it would trim the message too.
_CONTINUE_MARK = "\U000f1000octavo-continue\U000f1001"


_LEAST_LIMIT, _MOST_COPIES = 1 << 20, 16
"""Characters that any template may write, and for each that it gets."""
_TESTS_NONE = re.compile(r"""content["']?\]?\s+is\s+(not\s+)?[nN]one""")
"""In templates that tell a message with calls by its content, which is none."""
# A template is a foreign program: what it raises says that it cannot do with these messages.
_FAILURES = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How messages are rendered, besides the messages."""

    add_generation_prompt: bool = True
    """End with the header of the assistant's answer."""
    continue_final_message: bool = False
    """End within the last message, so that the model goes on with it."""
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""


class ChatTemplate:
    """One compiled template. Rendering is pure, but for the clock of `strftime_now`."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are variables such as bos_token. Raises ChatTemplateError."""
        self._special_tokens = dict(special_tokens or {})
        self._source_len = len(source)
        environment = BoundedSandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except RecursionError as error:
            raise ChatTemplateError(
                "the chat template is nested too deeply; give another one with chat_template",
                param="chat_template",
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is malformed at line {error.lineno}: {error.message}; give "
                "another one with chat_template",
                param="chat_template",
            ) from error
        self._reads_documents = "documents" in names
        self._reads_tools = "tools" in names
        self._reads_calls = "tool_calls" in source
        self._tests_none = _TESTS_NONE.search(source) is not None

    def render(
        self,
        messages: Sequence[Message],
        options: ChatOptions | None = None,
        *,
        num_characters: int = 0,
    ) -> str:
        """Returns the prompt text. Raises ChatTemplateError with the template's own message.

        `num_characters` are those of all that the template gets: what it may write follows.
        """
        options = options or ChatOptions()
        if not messages:
            raise ChatTemplateError("messages is empty; give at least one", param="messages")
        if options.documents and not self._reads_documents:
            raise ChatTemplateError(
                "the chat template does not read documents; put their text into a message",
                param="documents",
            )
        if options.continue_final_message:
            if options.add_generation_prompt:
                raise ChatTemplateError(
                    "continue_final_message and add_generation_prompt are both true; set "
                    "add_generation_prompt to false to continue the last message",
                    param="continue_final_message",
                )
            messages = [*messages[:-1], _with_mark(messages[-1])]
        if not self._reads_calls:
            messages = with_calls_as_text(messages)
        elif self._tests_none:
            messages = [_with_none(message) for message in messages]
        if has_late_system(messages) and not self._keeps_late_system:
            messages = as_users_words(messages)
        if options.tools and not self._reads_tools:
            return self._render_with_tools(messages, options, num_characters)
        return self._render(messages, options, num_characters)

    @cached_property
    def _keeps_late_system(self) -> bool:
        return keeps_late_system(lambda messages: self._render(messages, ChatOptions(), 0))

    def _render_with_tools(
        self, messages: Sequence[Message], options: ChatOptions, num_characters: int
    ) -> str:
        """For templates that know no tools: the messages tell of them."""
        tools = options.tools or ()
        try:
            return self._render(with_tools(messages, tools), options, num_characters)
        except ChatTemplateError:
            without_system = with_tools(messages, tools, in_system=False)
            return self._render(without_system, options, num_characters)

    def _render(
        self, messages: Sequence[Message], options: ChatOptions, num_characters: int
    ) -> str:
        variables = {**self._special_tokens, **options.template_kwargs}
        variables |= {"messages": messages, "tools": options.tools, "documents": options.documents}
        variables["add_generation_prompt"] = options.add_generation_prompt
        variables["range"] = counted_range()
        limit = _LEAST_LIMIT + _MOST_COPIES * (num_characters + self._source_len)
        try:
            text = joined(self._template.generate(variables), limit)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        except _FAILURES as error:
            raise ChatTemplateError(
                f"the chat template failed on the messages: {type(error).__name__}: {error}",
                param="messages",
            ) from error
        return _up_to_mark(text) if options.continue_final_message else text


class ChatRenderer:
    """A template, and the special tokens that only it may write. Can be sent to a process."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], special_texts: Sequence[str]
    ) -> None:
        """`special_texts` are those of all special tokens. Raises ChatTemplateError."""
        self._arguments = (source, special_tokens, special_texts)
        self._template = ChatTemplate(source, special_tokens)
        self._pattern = longest_first(special_texts)
        self._prefixes = {text[:n] for text in special_texts for n in range(1, len(text))}
        self._longest = max((len(text) for text in special_texts), default=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatRenderer, self._arguments

    def render(
        self, messages: Sequence[Message], options: ChatOptions | None = None
    ) -> RenderedChat:
        """Returns the prompt's text, what users wrote apart. Raises ChatTemplateError."""
        options = options or ChatOptions()
        shield = _Shield(self._pattern, self._prefixes, self._longest)
        safe_messages = shield.hide(list(messages), "messages")
        safe_options = replace(
            options,
            tools=shield.hide(options.tools, "tools"),
            documents=shield.hide(options.documents, "documents"),
            template_kwargs=shield.hide(dict(options.template_kwargs), "chat_template_kwargs"),
        )
        text = self._template.render(
            safe_messages, safe_options, num_characters=shield.num_characters
        )
        return RenderedChat(text=text, literals=tuple(shield.literals), nonce=shield.nonce)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A prompt's text, in which marks stand for special tokens' characters that users wrote."""

    text: str
    literals: tuple[str, ...] = ()
    nonce: str = ""

    @property
    def shown(self) -> str:
        """The text without marks."""
        return self.show(self.text) if self.literals else self.text

    def show(self, text: str) -> str:
        """Returns `text` with what was hidden back in its place."""
        mark = re.compile(f"\U000f2000{self.nonce}([0-9]+)\U000f2001")
        return mark.sub(lambda found: self.literals[int(found[1])], text)


class _Shield:
    """Hides special tokens in what the user wrote, for the time of rendering.

    Also the beginning of one at the end of a string: the template may put two strings together.
    The marks hold a nonce, so that no text can contain them.
    """

    def __init__(self, pattern: re.Pattern[str] | None, prefixes: set[str], longest: int) -> None:
        self._pattern = pattern
        self._prefixes = prefixes
        self._longest = longest
        self.nonce = secrets.token_hex(8)
        self.literals: list[str] = []
        """What was hidden: whole special tokens, or what could become part of one."""
        self.num_characters = 0
        """Of all strings that were shielded."""

    def hide(self, value: Any, param: str, depth: int = 0) -> Any:
        """Returns `value`, a part of the request's `param`, with every string in it shielded.

        Raises ChatTemplateError where it is nested too deeply for templates, which recurse.
        """
        if isinstance(value, str):
            self.num_characters += len(value)
            return self._hide_text(value) if self._pattern else value
        if not isinstance(value, (Mapping, Sequence)):
            return value
        if depth == MAX_DEPTH:
            raise ChatTemplateError(
                f"{param} is nested more than {MAX_DEPTH} levels deep; make it flatter",
                param=param,
            )
        if isinstance(value, Mapping):
            hidden = {
                self.hide(key, param, depth + 1): self.hide(item, param, depth + 1)
                for key, item in value.items()
            }
            if isinstance(value, CallArguments):
                return CallArguments(hidden, self.hide(value.text, param, depth + 1))
            return hidden
        return [self.hide(item, param, depth + 1) for item in value]

    def _hide_text(self, text: str) -> str:
        assert self._pattern is not None
        text = self._pattern.sub(lambda found: self._put(found[0]), text)
        for length in range(min(len(text), self._longest), 0, -1):
            tail = text[-length:]
            if tail in self._prefixes:
                return text[:-length] + self._put(tail)
        return text

    def _put(self, literal: str) -> str:
        self.literals.append(literal)
        return f"\U000f2000{self.nonce}{len(self.literals) - 1}\U000f2001"


def longest_first(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the longest of `texts` at each place, as tokenizers does."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _with_mark(message: Message) -> Message:
    """Returns the message with the mark behind its last text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK + " "}
    parts = list(content) if isinstance(content, Sequence) else []
    for place in reversed(range(len(parts))):
        part = parts[place]
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[place] = {**part, "text": part["text"] + _CONTINUE_MARK + " "}
            return {**message, "content": parts}
    raise ChatTemplateError(
        "continue_final_message needs a last message with text content",
        param="continue_final_message",
    )


def _with_none(message: Message) -> Message:
    """Returns a message with calls and no content as templates know it that test for none."""
    if message.get("tool_calls") and not message.get("content"):
        return {**message, "content": None}
    return message


def _up_to_mark(text: str) -> str:
    end = text.rfind(_CONTINUE_MARK)
    if end < 0:
        raise ChatTemplateError(
            "the chat template leaves out the last message, so it cannot be continued",
            param="continue_final_message",
        )
    is_trimmed = not text.startswith(" ", end + len(_CONTINUE_MARK))
    return text[:end].rstrip() if is_trimmed else text[:end]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks the assistant's text for training, as a block."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
