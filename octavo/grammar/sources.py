"""What a user asks for, in the library's form: schema, pattern, choice, grammar, structural tag.

Called at the face that received it. What can be refused without compiling is refused here.
"""

from __future__ import annotations

import json

from octavo.constraint import StructuredOutputsParams
from octavo.grammar.lark import JsonSpelling, LarkWriter, Specials, as_lark, with_spelling
from octavo.grammar.schema import fit_schema
from octavo.grammar.structural_tag import write_structural_tag

_OBJECT = '{"type":"object"}'


def grammar_text(wanted: StructuredOutputsParams, specials: Specials | None = None) -> str:
    """Returns the grammar that `wanted` stands for, as text.

    `specials` are the tokenizer's special tokens. Raises RequestError with the field and reason.
    """
    spelling = _spelling(wanted)
    writer = LarkWriter(specials or {}, spelling)
    kind = wanted.kind
    if kind in ("json", "json_object"):
        assert wanted.json is None or isinstance(wanted.json, str)
        schema = fit_schema(
            json.loads(wanted.json or _OBJECT), closes_objects=wanted.disable_additional_properties
        )
        one = {"name": "start", "json_schema": with_spelling(schema, spelling)}
        return json.dumps({"grammars": [one]}, ensure_ascii=False)
    if kind == "regex":
        assert wanted.regex is not None
        return writer.build(writer.regex(wanted.regex))
    if kind == "choice":
        assert wanted.choice is not None
        # The text is what counts: a special token spelt out is text here too.
        return LarkWriter().build(" | ".join(map(LarkWriter().literal, wanted.choice)))
    if kind == "grammar":
        assert wanted.grammar is not None
        return as_lark(wanted.grammar)
    assert isinstance(wanted.structural_tag, str)
    return writer.build(write_structural_tag(writer, json.loads(wanted.structural_tag)))


def _spelling(wanted: StructuredOutputsParams) -> JsonSpelling:
    if wanted.disable_any_whitespace or wanted.whitespace_pattern is not None:
        return JsonSpelling(item=",", key=":", whitespace=wanted.whitespace_pattern)
    return JsonSpelling()
