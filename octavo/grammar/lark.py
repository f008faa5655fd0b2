"""Writes the library's grammars (a dialect of Lark) rule by rule.

Used by `sources`, `structural_tag` and whoever binds tool calls. Knows the syntax alone: what is
put into it has been checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from octavo.errors import RequestError
from octavo.grammar.schema import Schema

MAX_RULES = 1000
"""Of a client's grammar: terminals that are made of each other take long to compile."""
ANY_TEXT = r"/(.|\n)*/"

Specials = Mapping[str, int]
"""Special tokens by their text: where a grammar's text has one, that very token is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSpelling:
    """How JSON is spelt. `item` and `key` are regular expressions of what separates."""

    item: str = ", ?"
    key: str = ": ?"
    whitespace: str | None = None

    def options(self) -> dict[str, object]:
        """Returns the library's options; all are named, so that no schema sets its own."""
        return {
            "item_separator": self.item,
            "key_separator": self.key,
            "whitespace_flexible": False,
            "whitespace_pattern": self.whitespace,
            "coerce_one_of": False,
            "lenient": False,
        }


@dataclass(slots=True)
class LarkWriter:
    """Collects rules. What `literal`, `schema`, ... return can stand in the body of a rule."""

    specials: Specials = field(default_factory=dict)
    spelling: JsonSpelling = field(default_factory=JsonSpelling)
    _rules: list[str] = field(default_factory=list)
    _others: list[dict[str, str]] = field(default_factory=list)

    def rule(self, body: str, attributes: str = "") -> str:
        """Adds a rule under a name of its own, and returns the name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body or _quoted('')}")
        return name

    def literal(self, text: str) -> str:
        """Returns exactly this text, its special tokens as such."""
        if not text:
            return _quoted("")
        if not self.specials:
            return _quoted(text)
        ordered = sorted(self.specials, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, ordered))})", text)
        return " ".join(
            f"<[{self.specials[piece]}]>" if piece in self.specials else _quoted(piece)
            for piece in pieces
            if piece
        )

    def starts_special(self, text: str) -> bool:
        """Whether the first token of `text` is a special one."""
        return any(text.startswith(special) for special in self.specials)

    def schema(self, schema: Schema) -> str:
        """Returns JSON that fits a schema made fit by `fit_schema`."""
        return f"%json {json.dumps(with_spelling(schema, self.spelling), ensure_ascii=False)}"

    def regex(self, pattern: str) -> str:
        r"""Returns what matches a pattern; \d and \w are ASCII's, as in JSON schemas."""
        from llguidance import regex_to_lark

        return f"/{regex_to_lark(pattern, 'dw')}/"

    def grammar(self, lark: str) -> str:
        """Returns a whole grammar of its own, with its `start`."""
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def any_text(self) -> str:
        return self.rule(ANY_TEXT)

    def text_until(self, end: str, text: str = ANY_TEXT) -> str:
        """Returns a text, any or of a pattern, and the first `end` after it, after which something
        may follow."""
        if self.starts_special(end):
            return f"{self.rule(text)} {self.literal(end)}"
        return self.rule(f"{text} {_quoted(end)}", "[lazy]")

    def either(self, options: Iterable[str]) -> str:
        """Returns any one of the options."""
        return self.rule(" | ".join(options))

    def build(self, start: str) -> str:
        """Returns the grammar whose text is `start`."""
        lark = "\n".join(("%llguidance {}", f"start: {start}", *self._rules, ""))
        first = {"name": "start", "lark_grammar": lark}
        return json.dumps({"grammars": [first, *self._others]}, ensure_ascii=False)


def with_spelling(schema: Schema, spelling: JsonSpelling) -> dict[str, object]:
    """Returns a schema, made fit, that says how its JSON is spelt."""
    return {**({} if isinstance(schema, bool) else schema), "x-guidance": spelling.options()}


def as_lark(grammar: str) -> str:
    """Returns a grammar in Lark's form; GBNF is known by its `::=`. Raises RequestError."""
    num_rules = len(re.findall(r"^\s*[?!]?[\w.-]+[^:\n]*:", grammar, re.MULTILINE))
    if num_rules > MAX_RULES:
        raise RequestError(
            f"structured_outputs.grammar has {num_rules} rules; at most {MAX_RULES} are taken",
            param="structured_outputs.grammar",
        )
    if not re.search(r"^\s*[\w-]+\s*::=", grammar, re.MULTILINE):
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the library's own and whatever its reader stumbles over
        reason = " ".join(str(error).split())
        raise RequestError(
            f"structured_outputs.grammar cannot be read as GBNF: {reason}",
            param="structured_outputs.grammar",
        ) from error


def _quoted(text: str) -> str:
    """Returns a text in quotes; the dialect wants control characters escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", quoted)
