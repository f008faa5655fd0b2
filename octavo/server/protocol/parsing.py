"""From decoded JSON to a model of the protocol, and what the client is told if that fails.

Called by `server.body`; never reads or decodes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from octavo.errors import RequestError
from octavo.server.protocol.strict import StrictModel

Model = TypeVar("Model", bound=StrictModel)

_LONGEST_NAME = 64
_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a text of at least {min_length} character",
    "string_too_long": "a string of at most {max_length} characters",
    "string_pattern_mismatch": "a string that fits {pattern}",
    "list_type": "a list",
    "too_short": "a list of at least {min_length} element",
    "too_long": "a list or an object of at most {max_length} elements",
    "dict_type": "an object",
    "model_type": "an object",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
}
"""What a value should have been, by pydantic's kind of error."""


def parse(model: type[Model], data: object) -> Model:
    """Returns `data` as a `model`. Raises RequestError naming the field, what it must be."""
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object", code="not_an_object")
    try:
        return cast(Model, model.variant(data).model_validate(data))
    except ValidationError as error:
        raise _explained(error.errors(include_url=False, include_input=False)) from error


def _explained(errors: Sequence[ErrorDetails]) -> RequestError:
    """Returns what is told of the first field that is wrong."""
    first = errors[0]
    field = str(first["loc"][0])
    if first["type"] == "missing":
        where = _place(first["loc"])
        return RequestError(f"{where} is missing", param=where, code="missing_field")
    same = [error for error in errors if error["loc"][0] == field]
    # A field that may have several types has one error for each; the client is told all of them,
    # unless it sent a list: then an element is wrong.
    same = [error for error in same if any(isinstance(p, int) for p in error["loc"])] or same
    wanted = dict.fromkeys(_wanted(error) for error in same)
    where = field if len(same) > 1 else _place(same[0]["loc"])
    return RequestError(f"{where} must be {' or '.join(wanted)}", param=where, code="invalid_value")


def _wanted(error: ErrorDetails) -> str:
    words = _WANTED.get(error["type"])
    if words is None:
        return error["msg"].removeprefix("Input should be ")
    return words.format(**error.get("ctx", {}))


def _place(location: Sequence[int | str]) -> str:
    """Returns a place as a client writes it: `stop[0]`, `stream_options.include_usage`."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() or part.isdigit() or not place:
            place += f".{part[:_LONGEST_NAME]}" if place else part
    return place
