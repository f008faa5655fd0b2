"""The description of the API, GET /openapi.json: bodies, answers, errors.

Routes say with `described` what they take and give, since they read their bodies themselves;
`install` makes the whole. Never reads a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from octavo.request_limits import MAX_INT
from octavo.server.answer_schemas import ANSWERS
from octavo.server.message_errors import OVERLOADED, is_message_path
from octavo.server.protocol.strict import StrictModel
from octavo.server.state import ServerState
from octavo.server.tenants.callers import ALL_SCOPES
from octavo.server.tenants.route_scopes import RouteScopes

Schema = dict[str, Any]

STATUSES = {
    400: "The request makes no sense; the error names the field.",
    401: "A key is missing or wrong.",
    403: "The key has no scope that lets it in here.",
    404: "There is no such model, or no such object of yours.",
    408: "The body did not come in time.",
    409: "What it asks for is in use, or over.",
    413: "The body is too large.",
    500: "An internal error.",
    503: "No room, not ready, or ending; Retry-After says when to come back.",
    507: "The store has no room.",
    OVERLOADED: "No room; Retry-After says when to come back.",
}
_READS = (400, 404, 408, 413)
"""What a route that reads a body can answer, besides what every route can."""
BYTES = "application/octet-stream"
"""The answer of a route that returns no JSON."""
_CONTENTS = ("messages", "prompt", "tokens", "input", "text_1", "documents")
"""Fields of which each body has one."""
_SCHEMAS = "#/components/schemas/"


def described(
    answer: str,
    body: type[StrictModel] | None = None,
    *,
    streams: bool = False,
    statuses: tuple[int, ...] = (),
    query: type[StrictModel] | None = None,
    form: type[StrictModel] | None = None,
) -> dict[str, Any]:
    """Returns the arguments of a route's decorator: its body (JSON, or the fields of a form beside
    its file), its query, its answer (a name in ANSWERS, or BYTES), what else it can answer, and
    whether it streams."""
    content: Schema = {"application/json": {"schema": _ref(answer)}}
    if answer == BYTES:
        content = {BYTES: {"schema": {"type": "string", "format": "binary"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[int | str, Schema] = {200: {"description": "The answer.", "content": content}}
    for status in sorted({*statuses, *(_READS if body or form else ()), 500, 503}):
        responses[status] = _error(status)
    extra: Schema = {}
    if body is not None:
        taken = {"application/json": {"schema": _body_schema(body)}}
        extra["requestBody"] = {"required": True, "content": taken}
    if form is not None:
        taken = {"multipart/form-data": {"schema": _form_schema(form)}}
        extra["requestBody"] = {"required": True, "content": taken}
    if query is not None:
        extra["parameters"] = [*_parameters(query)]
    made: dict[str, Any] = {"response_model": None, "responses": responses}
    if answer == BYTES:
        made["response_class"] = Response  # else FastAPI would promise JSON, too
    return {**made, "openapi_extra": extra}


def install(app: FastAPI, state: ServerState) -> None:
    """Has `app.openapi()` return the description, with the limits of this very server; it is made
    when it is first asked for, in a tenth of a second."""
    app.openapi = cache(partial(_document, app, state))  # FastAPI's documented way


def _document(app: FastAPI, state: ServerState) -> Schema:
    made = get_openapi(
        title=app.title,
        version=app.version,
        description="OpenAI's completions and chat with vLLM's additions, Anthropic's messages. "
        "Null is the same as leaving a field out; unknown fields are refused. Errors are OpenAI's "
        "error objects, those of /v1/messages Anthropic's.",
        routes=app.routes,
    )
    document = deepcopy(made)  # It shares parts with the routes, which other apps have, too.
    schemas = deepcopy(ANSWERS)
    document["components"] = {"schemas": schemas}
    if state.config.root_path:
        document["servers"] = [{"url": state.config.root_path}]
    has_keys = not state.keyring.is_open
    if has_keys:
        bearer = {"type": "http", "scheme": "bearer", "description": "An API key."}
        own = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."}
        document["components"]["securitySchemes"] = {"key": bearer, "x-api-key": own}
    routes = RouteScopes(state.config.public_metrics)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # FastAPI's own, for what it would have parsed.
            operation["responses"].pop("422", None)
            for kind in operation.get("requestBody", {"content": {}})["content"].values():
                schemas |= kind["schema"].pop("$defs")
            if has_keys and not routes.is_open(path):
                operation["security"] = [{"key": []}, {"x-api-key": []}]
                operation["responses"]["401"] = _error(401)
                if routes.needed(path) != ALL_SCOPES:
                    operation["responses"]["403"] = _error(403)
            if is_message_path(path):
                _in_anthropics_form(operation["responses"])
    for schema in schemas.values():
        _narrow(schema, state)
    return document


def _in_anthropics_form(responses: Schema) -> None:
    responses[str(OVERLOADED)] = _error(OVERLOADED)
    for status, response in responses.items():
        if int(status) >= 400:
            response["content"] = {"application/json": {"schema": _ref("MessageError")}}


def _narrow(schema: Schema, state: ServerState) -> None:
    """Puts this server's limits into a body's schema: model, vocabulary, priorities."""
    low, high = state.config.priority_range
    fields: Schema = schema.get("properties", {})
    if not fields.keys().isdisjoint(_CONTENTS):
        fields.get("model", {})["anyOf"] = [{"enum": [*state.model_names]}, {"type": "null"}]
    # Not where it changes nothing, nor where operators have keys: for them there are no limits.
    has_others = state.config.operator_key or not state.keyring.is_plain
    if "anyOf" in fields.get("priority", {}) and not has_others:
        limits = {"type": "integer", "minimum": low, "maximum": high}
        fields["priority"]["anyOf"] = [limits, {"type": "null"}]
    for field in fields.values():
        _narrow_ids(field, state.engine.vocab_size)


def _narrow_ids(schema: Schema, vocab_size: int) -> None:
    if schema.get("type") == "array":
        items = schema["items"]
        if items.get("maximum") == MAX_INT:
            schema["items"] = {**items, "maximum": vocab_size - 1}
        _narrow_ids(items, vocab_size)
    for inner in schema.get("anyOf", ()):
        _narrow_ids(inner, vocab_size)


def _body_schema(model: type[StrictModel]) -> Schema:
    """Returns a reference to a model, with the schemas it needs beside it."""
    found: dict[str, Schema] = {}
    variants = model.variants()
    for variant in variants:
        schema = variant.model_json_schema(ref_template=_SCHEMAS + "{model}")
        found |= schema.pop("$defs", {})
        found[variant.__name__] = schema
    if variants != (model,):
        found[model.__name__] = {"anyOf": [_ref(variant.__name__) for variant in variants]}
    return {**_ref(model.__name__), "$defs": found}


def _form_schema(model: type[StrictModel]) -> Schema:
    schema = _without_null(model)
    file = {"type": "string", "format": "binary", "description": "The file, with its name."}
    schema["properties"] = {"file": file, **schema["properties"]}
    schema["required"] = ["file", *schema.get("required", ())]
    return {**_ref(model.__name__), "$defs": {model.__name__: schema}}


def _parameters(model: type[StrictModel]) -> Iterator[Schema]:
    for name, field in _without_null(model)["properties"].items():
        description = field.pop("description")
        yield {"name": name, "in": "query", "description": description, "schema": field}


def _without_null(model: type[StrictModel]) -> Schema:
    """Returns the schema of a model whose values are texts: there, null is no value."""
    schema = model.model_json_schema()
    for field in schema["properties"].values():
        if "anyOf" in field:
            [value] = [one for one in field.pop("anyOf") if one != {"type": "null"}]
            field.update(value)
    return schema


def _ref(name: str) -> Schema:
    return {"$ref": _SCHEMAS + name}


def _error(status: int) -> Schema:
    content = {"application/json": {"schema": _ref("Error")}}
    return {"description": STATUSES[status], "content": content}
