"""The base of all bodies: exact types, no field unknown, null where nothing is asked.

Subclassed by the families' models, called through `parse`; never touches the engine.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from octavo.engine.chat_template import ChatRenderer
from octavo.errors import RequestError, shown
from octavo.request_fields import Refused, refuse_field
from octavo.request_limits import (
    MAX_INT,
    MAX_LISTED,
    MAX_TEXTS,
)

Priority = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Text = Annotated[str, Field(min_length=1)]
# The first wrong element tells enough: a list of a million would make a million errors.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_LISTED)]
Texts = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_TEXTS["stop"][0])]

_Ints = list[int]
PackedIds = array
"""Token ids of 32 bits: a million of them are one object."""


def packed_ids(ids: object, where: str, param: str) -> PackedIds:
    """Returns a list of token ids, packed at C's speed. Raises RequestError."""
    try:
        # Half the time that looking at each one's type would take.
        return array("I", msgspec.convert(ids, _Ints))
    except msgspec.ValidationError:
        message = f"{where} must be a list of token ids, integers"
        raise RequestError(message, param=param) from None
    except OverflowError:
        assert isinstance(ids, list)
        wrong = min(ids) if min(ids) < 0 else max(ids)
        message = f"{where} has token id {shown(wrong)}; no vocabulary has such an id"
        raise RequestError(message, param=param) from None


def check_chars(value: object, field: str, most: int) -> None:
    """Raises RequestError if the JSON of a field's value is longer."""
    num_chars = 0 if value is None else len(msgspec.json.encode(value).decode())
    if num_chars > most:
        message = f"{field} has {num_chars} characters; at most {most} are taken"
        raise RequestError(message, param=field)


_LONGEST_NAME = 64
_MEANT = {
    **dict.fromkeys(("max_completion_tokens", "max_new_tokens", "n_predict"), ("max_tokens",)),
    **dict.fromkeys(("stop_sequences", "stop_strings"), ("stop",)),
    **dict.fromkeys(("prompt", "input", "inputs", "text"), ("messages", "prompt")),
    "messages": ("prompt",),
    "text_tokens": ("tokens",),
}
"""Names that others have for fields, or that this field has on another route."""
"""Of a field that is compared with the known ones; comparing takes the square of the length."""


def integer(description: str, low: int, high: int = MAX_INT) -> Any:
    """Returns an optional field for an integer, whose range is said in the schema alone: who takes
    the value checks it, and says more than pydantic would."""
    limits: dict[str, Any] = {"minimum": low, "maximum": high}
    return Field(None, description=description, json_schema_extra=limits)


class StrictModel(BaseModel):
    """Exact types; ignored fields dropped, refused and unknown ones refused by name.

    Null is the same as absent, for every field: clients that write all their fields send it.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    place: ClassVar[str] = ""
    """Where the model stands in a body, before the names of its fields."""
    aliases: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that pydantic's own methods have, so that they are called by an alias."""
    ignored_fields: ClassVar[frozenset[str]] = frozenset()
    refused_fields: ClassVar[Refused] = {}
    max_quick_bytes: ClassVar[int] = 2**20
    """Longer bodies are parsed in a process of their own."""
    max_quick_values: ClassVar[int] = 4096
    """So are those that may hold more values."""

    @classmethod
    def variant(cls, data: Mapping[str, Any]) -> type[StrictModel]:
        """Returns the class, this one or one below it, that reads `data`."""
        return cls

    @classmethod
    def variants(cls) -> tuple[type[StrictModel], ...]:
        """Returns all classes that `variant` may return."""
        return (cls,)

    def field_name(self, param: str) -> str:
        """Returns the field of this body that the engine's `param` was read from."""
        return param

    def check_size(self) -> None:
        """Raises RequestError for objects so large that whoever gets them from another process
        would stand still meanwhile."""

    def with_rendered(self, renderer: ChatRenderer) -> Self:
        """Returns the body of a chat with its text, and little of what it was made of; any other
        as it is. Raises RequestError, ChatTemplateError among them."""
        return self

    @model_validator(mode="before")
    @classmethod
    def _sift_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept, fields = {}, cls.__pydantic_fields__  # as `model_fields`, which costs a search
        for name, value in data.items():
            if name in fields or name in cls.aliases:
                if value is not None:
                    kept[name] = value
            elif name in cls.refused_fields:
                refuse_field(name, value, cls.refused_fields, cls.place)
            elif name not in cls.ignored_fields:
                raise cls._unknown_field(name)
        return kept

    @classmethod
    def _unknown_field(cls, name: str) -> RequestError:
        hint = "see GET /docs for the known ones"
        near = [one for one in _MEANT.get(name, ()) if one in cls.model_fields]
        if not near and len(name) <= _LONGEST_NAME:
            # No hint is better than a wrong one.
            fields = {field.alias or one for one, field in cls.model_fields.items()}
            known = sorted({*fields, *cls.ignored_fields})
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near:
            hint = f"did you mean {cls.place}{near[0]}?"
        elif name == "extra_body":
            hint = "that is an argument of OpenAI's client; put what it holds into the body itself"
        param = cls.place + name[:_LONGEST_NAME]
        message = f"{shown(cls.place + name)} is an unknown field; {hint}"
        return RequestError(message, param=param, code="unknown_field")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Returns pydantic's schema, in which null is allowed wherever a field is optional."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema.pop("description", None)
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            field.pop("title", None)
            if field.get("default", 0) is None:
                del field["default"]
            if name not in required and not _takes_null(field):
                _allow_null(field)
        ignored = {"description": "Changes nothing here."}
        schema["properties"] |= dict.fromkeys(sorted(cls.ignored_fields), ignored)
        return schema


def _takes_null(field: dict[str, Any]) -> bool:
    return any(one.get("type") == "null" for one in field.get("anyOf", ()))


def _allow_null(field: dict[str, Any]) -> None:
    kept = {name: field.pop(name) for name in ("description", "default") if name in field}
    inner = dict(field)
    field.clear()
    field.update({"anyOf": [inner, {"type": "null"}], **kept})


class RequestModel(StrictModel):
    """Base of all request bodies."""

    model: str | None = Field(None, description="The served model's name; may be left out.")
