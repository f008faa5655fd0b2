"""What an output is bound to: the user's words for it, and what enters the engine.

Shared by every layer. Fields are checked here for type and size; what they mean is
`octavo.grammar`'s.
"""

from __future__ import annotations

import json as json_lib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError, shown

MAX_GRAMMAR_CHARS = 256 * 1024
"""Of a schema, a grammar, a pattern, or all choices: it is compiled, and kept while it runs."""
MAX_CHOICES = 4096
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""The fields of which exactly one is given."""
FORM_TOO_LARGE = "the output cannot be held to its form any further: "
"""How the error of a sequence begins whose form was too large, as only its tokens showed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must be. Names are vLLM's; exactly one of the first six is given.

    Raises RequestError (naming the field, the value and the limit).
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, or its text; text after checking."""
    regex: str | None = None
    """The whole output matches it; Rust's syntax, without look-around and back references."""
    choice: tuple[str, ...] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """A grammar in Lark's form (`start: ...`) or in GBNF (`root ::= ...`)."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text with bound parts between tags, or its JSON text."""
    disable_any_whitespace: bool = False
    """JSON without white space between its parts; otherwise one space may follow , and :."""
    disable_additional_properties: bool = False
    """Objects have no properties but those that the schema names."""
    whitespace_pattern: str | None = None
    """A regular expression of the white space between the parts of JSON."""

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            found = "none" if not given else " and ".join(given)
            message = f"structured_outputs needs exactly one of {', '.join(KINDS)}, got {found}"
            raise RequestError(message, param="structured_outputs")
        for name in ("json", "structural_tag"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _as_json_text(value, name))
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None:
                _check(isinstance(value, str) and bool(value), name, "a text of some length", value)
                _check_size(value, name)
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            _check(value is None or isinstance(value, bool), name, "true or false", value)
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            message = "disable_any_whitespace leaves nothing for whitespace_pattern; give one"
            raise RequestError(message, param="structured_outputs.whitespace_pattern")

    @property
    def kind(self) -> str:
        """The field of KINDS that is given."""
        return self._given()[0]

    @property
    def num_chars(self) -> int:
        """Of what is given: about as long as compiling it takes."""
        value = getattr(self, self.kind)
        return sum(map(len, value)) if isinstance(value, tuple) else len(str(value))

    def _given(self) -> list[str]:
        """A schema may be `false`; any object is asked for by `true` alone."""
        values = {name: getattr(self, name) for name in KINDS}
        return [
            name
            for name, value in values.items()
            if value is not None and (name, value) != ("json_object", False)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the engine holds an output to."""

    grammar: str
    """In the library's form, as `octavo.grammar.grammar_text` writes it; empty: nothing is held
    but the length of the reasoning."""
    thought_begins: tuple[int, ...] = ()
    """Token ids of which one may be the first of the output: it reasons then."""
    thought_ends: tuple[int, ...] = ()
    """Token ids that end the reasoning: until one has come the output is free, but does not end."""
    starts_inside: bool = False
    """Whether it reasons from its first token on."""
    thought_budget: int | None = None
    """Tokens of the reasoning at most: one that ends it comes then."""


def _check(is_valid: bool, name: str, limit: str, value: object) -> None:
    if not is_valid:
        message = f"structured_outputs.{name} must be {limit}, got {shown(value)}"
        raise RequestError(message, param=f"structured_outputs.{name}")


def _check_size(text: str, name: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        message = (
            f"structured_outputs.{name} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} "
            "are taken"
        )
        raise RequestError(message, param=f"structured_outputs.{name}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"structured_outputs.{name} has half of a surrogate pair at {error.start}"
        raise RequestError(message, param=f"structured_outputs.{name}") from error


def _as_json_text(value: object, name: str) -> str:
    """Returns the compact JSON text of an object, of `true`, or of such a text."""
    field = f"structured_outputs.{name}"
    try:
        parsed = json_lib.loads(value) if isinstance(value, str) else value
        _check(isinstance(parsed, (Mapping, bool)), name, "a JSON object, or its text", value)
        text = json_lib.dumps(
            dict(parsed) if isinstance(parsed, Mapping) else parsed,
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
    except RequestError:
        raise
    except RecursionError as error:
        raise RequestError(f"{field} is nested too deep", param=field) from error
    except (ValueError, TypeError) as error:
        raise RequestError(f"{field} is no JSON: {error}", param=field) from error
    _check_size(text, name)
    return text


def _as_choices(value: object) -> tuple[str, ...]:
    given: tuple[object, ...] = ()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        given = tuple(value)
    choices = tuple(one for one in given if isinstance(one, str))
    is_valid = 0 < len(choices) == len(given) <= MAX_CHOICES
    _check(is_valid, "choice", f"a list of 1 to {MAX_CHOICES} texts", value)
    _check_size("".join(choices), "choice")
    return choices
