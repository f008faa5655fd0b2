"""A query string, parsed into its model as bodies are.

Called by the routes that take parameters there. Never interprets one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from octavo.server.protocol.parsing import parse
from octavo.server.protocol.strict import StrictModel

Query = TypeVar("Query", bound=StrictModel)


def read_query(request: Request, model: type[Query]) -> Query:
    """Returns the request's query as a `model`. Raises RequestError naming the parameter."""
    return parse_texts(model, request.query_params)


def parse_texts(model: type[Query], texts: Mapping[str, str]) -> Query:
    """Returns texts by name as a `model`; fields that are integers are read from their digits.
    Raises RequestError."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    data: dict[str, Any] = dict(texts)
    for name, text in texts.items():
        is_number = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20
        if is_number and name in fields and fields[name].annotation in (int, int | None):
            data[name] = int(text)
    return parse(model, data)
