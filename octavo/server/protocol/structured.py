"""The fields that hold an answer to a form, in all their spellings, and their one meaning.

Part of the bodies of chat and completions; never touches the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from octavo.constraint import MAX_CHOICES, StructuredOutputsParams
from octavo.errors import RequestError
from octavo.server.protocol.strict import RequestModel, StrictModel, Texts

Schema = dict[str, Any] | bool
SchemaOrText = dict[str, Any] | bool | str

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
"""vLLM's old names, which are taken still: nothing that binds an answer is ever dropped."""


class JsonSchemaFormat(StrictModel):
    """OpenAI's wrapping of a schema."""

    place = "response_format.json_schema."
    aliases = frozenset({"schema"})

    name: str | None = Field(None, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing.")
    schema_: Schema = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="Changes nothing: every schema is held to.")


class ResponseFormat(StrictModel):
    """What the answer must be, in OpenAI's form."""

    place = "response_format."

    type: Literal["text", "json_object", "json_schema", "structural_tag"] = Field(
        description="text: anything."
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="For json_schema.")
    structures: list[dict[str, Any]] | None = Field(
        None, description="For structural_tag: objects with begin, schema and end."
    )
    triggers: list[str] | None = Field(
        None, description="For structural_tag: texts of which each begins one of the structures."
    )
    format: dict[str, Any] | None = Field(
        None, description="For structural_tag, instead of the two: nested nodes, each with a type."
    )

    def wanted(self) -> dict[str, Any]:
        """Returns the same as fields of StructuredOutputsParams, none for text."""
        needed = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers")}
        given = [
            name
            for name in ("json_schema", "structures", "triggers", "format")
            if getattr(self, name) is not None
        ]
        if self.type == "structural_tag" and given == ["format"]:
            return {"structural_tag": {"format": self.format}}
        if given != list(needed.get(self.type, ())):
            wanted = " and ".join(needed.get(self.type, ())) or "no other field"
            found = " and ".join(given) or "none"
            message = f"response_format of type {self.type} needs {wanted}, got {found}"
            raise RequestError(message, param="response_format")
        if self.json_schema is not None:
            return {"json": self.json_schema.schema_}
        if self.type == "json_object":
            return {"json_object": True}
        if self.type == "structural_tag":
            return {"structural_tag": {"structures": self.structures, "triggers": self.triggers}}
        return {}


class StructuredOutputs(StrictModel):
    """What the answer must be, in vLLM's form: exactly one of the first six fields."""

    place = "structured_outputs."
    aliases = frozenset({"json"})
    ignored_fields = frozenset({"disable_fallback"})

    json_: SchemaOrText | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = Field(None, description="The whole answer matches it.")
    choice: Texts | None = Field(None, description=f"One of up to {MAX_CHOICES} texts.")
    grammar: str | None = Field(None, description="In Lark's form, or in GBNF.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    structural_tag: dict[str, Any] | str | None = Field(
        None, description="Free text with bound parts between tags."
    )
    disable_any_whitespace: bool = Field(False, description="No white space between JSON's parts.")
    disable_additional_properties: bool = Field(
        False, description="Objects have no properties but those of the schema."
    )
    whitespace_pattern: str | None = Field(
        None, description="A regular expression of the white space between JSON's parts."
    )

    def wanted(self) -> dict[str, Any]:
        """Returns the same as fields of StructuredOutputsParams, none if nothing is asked."""
        values = {name.rstrip("_"): getattr(self, name) for name in type(self).model_fields}
        return {
            name: value
            for name, value in values.items()
            if value is not None and (value is not False or name == "json")
        }


class StructuredFields(RequestModel):
    """All spellings; at most one binds an answer."""

    response_format: ResponseFormat | None = Field(
        None, description="What the answer must be: text, JSON, JSON of a schema, tagged parts."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same and more: patterns, choices, grammars."
    )
    guided_json: SchemaOrText | None = Field(None, description="structured_outputs.json")
    guided_regex: str | None = Field(None, description="structured_outputs.regex")
    guided_choice: Texts | None = Field(None, description="structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="structured_outputs.grammar")
    guided_whitespace_pattern: str | None = Field(
        None, description="structured_outputs.whitespace_pattern"
    )

    def structured_params(self) -> StructuredOutputsParams | None:
        """Returns what the answer is held to. Raises RequestError naming the field."""
        if _BINDING.isdisjoint(self.model_fields_set):
            return None  # nearly always
        found = {name: wanted for name, wanted in self._spellings() if wanted}
        if not found:
            return None
        if len(found) > 1:
            names = " and ".join(found)
            message = f"{names} both bind the answer; send one"
            raise RequestError(message, param=list(found)[-1])
        [wanted] = found.values()
        try:
            return StructuredOutputsParams(**wanted)
        except RequestError as error:
            raise RequestError(str(error), param=self.structured_field(error.param)) from error

    @property
    def is_structured(self) -> bool:
        """Whether a field wants the answer to be bound, rightly or not."""
        return any(wanted for _, wanted in self._spellings())

    def _spellings(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in ("response_format", "structured_outputs"):
            given = getattr(self, name)
            if given is not None:
                yield name, given.wanted()
        guided = {new: getattr(self, old) for old, new in _GUIDED.items()}
        guided = {name: value for name, value in guided.items() if value is not None}
        if guided:
            yield next(old for old, new in _GUIDED.items() if new in guided), guided

    def structured_field(self, param: str | None) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        if self.structured_outputs is not None and self.structured_outputs.wanted():
            return param or "structured_outputs"
        kind = (param or "").rpartition(".")[2]
        named = next((old for old, new in _GUIDED.items() if new == kind), None)
        return named or next(
            (old for old in _GUIDED if getattr(self, old) is not None), "structured_outputs"
        )


_BINDING = StructuredFields.model_fields.keys() - RequestModel.model_fields.keys()
