"""The base of all bodies: exact types, no field unknown, and what any field may hold at most.

Subclassed by the families' models, called through `parse`; never touches the engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo.errors import RequestError

MAX_INT = 2**63 - 1
"""Engine and scheduler keep integers in 64 bits."""
MAX_TOKEN_ID = 2**31 - 1

Int = Annotated[int, Field(ge=-MAX_INT - 1, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# The first wrong element tells enough: a list of a million would make a million errors.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]

Refused = Mapping[str, tuple[str, tuple[Any, ...]]]
"""By field: what to do instead, and the values that ask for nothing."""


class StrictModel(BaseModel):
    """Exact types; ignored fields dropped, refused and unknown ones refused by name."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    ignored_fields: ClassVar[frozenset[str]] = frozenset()
    refused_fields: ClassVar[Refused] = {}

    @classmethod
    def variant(cls, data: Mapping[str, Any]) -> type[StrictModel]:
        """Returns the class, this one or one below it, that reads `data`."""
        return cls

    @model_validator(mode="before")
    @classmethod
    def _sift_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.refused_fields:
                reason, neutral = cls.refused_fields[name]
                if value is not None and value not in neutral:
                    message = f"{name} is not supported here: {reason}"
                    raise RequestError(message, param=name, code="unsupported_field")
            elif name not in cls.ignored_fields:
                raise _unknown_field(name, {*cls.model_fields, *cls.ignored_fields})
        return kept


def _unknown_field(name: str, known: set[str]) -> RequestError:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "see GET /docs for the known ones"
    return RequestError(f"{name!r} is an unknown field; {hint}", param=name, code="unknown_field")


class RequestModel(StrictModel):
    """Base of all request bodies."""

    model: str | None = None
