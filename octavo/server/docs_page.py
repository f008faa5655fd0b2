"""GET /docs and /openapi.json: the description of the API for people, as one HTML page without
scripts or anything from outside, and for programs.

Each is made once, when it is first asked for, beside the event loop; never sends a request.
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

Schema = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
code, pre { font: 0.9em/1.4 ui-monospace, monospace; }
pre { background: #8882; padding: 0.75rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.75rem 0.25rem 0;
  border-bottom: 1px solid #8884; }
.method { font-weight: bold; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def add_docs(app: FastAPI) -> None:
    """Adds the two routes, for what `app.openapi()` returns."""

    @cache
    def page() -> Response:
        text = "".join(_page(app.openapi()))
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    @cache
    def document() -> Response:
        return JSONResponse(app.openapi())

    for path, make in (("/docs", page), ("/openapi.json", document)):
        app.add_route(path, partial(_made, make), include_in_schema=False)


async def _made(make: Callable[[], Response], request: Request) -> Response:
    return await asyncio.to_thread(make)


def _page(document: Schema) -> Iterator[str]:
    title = f"{document['info']['title']} {document['info']['version']}"
    yield "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
    yield f"<h1>{_text(title)}</h1><p>{_text(document['info']['description'])}</p>\n"
    yield "<p>For programs: <a href='openapi.json'>openapi.json</a>.</p>\n<ul>"
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for method, path, operation in operations:
        yield f"<li><a href='#{_anchor(method, path)}'><code>{method.upper()} {_text(path)}</code>"
        yield f"</a> {_text(operation['description'])}</li>\n"
    yield "</ul>\n"
    for method, path, operation in operations:
        yield from _operation(document, method, path, operation)
    yield "</body></html>\n"


def _operation(document: Schema, method: str, path: str, operation: Schema) -> Iterator[str]:
    yield f"<h2 id='{_anchor(method, path)}'><code><span class='method'>{method.upper()}</span> "
    yield f"{_text(path)}</code></h2><p>{_text(operation['description'])}</p>\n"
    if "parameters" in operation:
        yield from _parameters(document, operation["parameters"])
    if "requestBody" in operation:
        yield f"<pre>{_text(_example(method, path))}</pre>\n"
        for schema in _variants(document, _schema_of(operation["requestBody"])):
            yield from _fields(document, schema)
    yield "<h3>Answers</h3><table><tr><th>status</th><th>type</th><th></th></tr>\n"
    for status, response in sorted(operation["responses"].items()):
        kinds = ", ".join(response.get("content", ()))
        yield f"<tr><td>{_text(status)}</td><td><code>{_text(kinds)}</code></td>"
        yield f"<td>{_text(response['description'])}</td></tr>\n"
    yield "</table>\n"


def _parameters(document: Schema, parameters: list[Schema]) -> Iterator[str]:
    fields = {one["name"]: {**one["schema"], **one} for one in parameters}
    needed = [one["name"] for one in parameters if one.get("required")]
    yield from _fields(
        document, {"title": "Path and query", "properties": fields, "required": needed}
    )


def _fields(document: Schema, schema: Schema) -> Iterator[str]:
    yield f"<h3>{_text(schema.get('title', 'Body'))}</h3>"
    yield "<table><tr><th>field</th><th>type</th><th></th></tr>\n"
    for name, field in schema["properties"].items():
        needed = " (needed)" if name in schema.get("required", ()) else ""
        said = field.get("description", "")
        if "default" in field:
            said += f" Default: {json.dumps(field['default'])}."
        yield f"<tr><td><code>{_text(name)}</code>{needed}</td>"
        yield f"<td><code>{_text(_kind(document, field))}</code></td><td>{_text(said)}</td></tr>\n"
    yield "</table>\n"


def _kind(document: Schema, schema: Schema) -> str:
    """Returns what a field may be, in words."""
    if "$ref" in schema:
        inner = _resolved(document, schema)
        return f"object of {', '.join(inner['properties'])}"
    if "anyOf" in schema:
        kinds = dict.fromkeys(_kind(document, one) for one in schema["anyOf"])
        return " or ".join(kinds) + _limits(schema)
    if "enum" in schema:
        return " or ".join(json.dumps(one) for one in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema['items'])}"
    return schema.get("type", "anything") + _limits(schema)


def _limits(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    return "" if low is None or high is None else f" in {low:g}..{high:g}"


def _variants(document: Schema, schema: Schema) -> list[Schema]:
    resolved = _resolved(document, schema)
    return [_resolved(document, one) for one in resolved.get("anyOf", [resolved])]


def _resolved(document: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def _schema_of(body: Schema) -> Schema:
    [content] = body["content"].values()
    return content["schema"]


_BODIES = {
    "/v1/chat/completions": '{"messages": [{"role": "user", "content": "Hello!"}]}',
    "/v1/completions": '{"prompt": "Once upon a time", "max_tokens": 20}',
    "/v1/batches": '{"input_file_id": "file-...", "endpoint": "/v1/chat/completions"}',
    "/tokenize": '{"prompt": "Once upon a time"}',
    "/detokenize": '{"tokens": [1, 2, 3]}',
}

_FORMS = {"/v1/files": "-F purpose=batch -F file=@requests.jsonl"}


def _example(method: str, path: str) -> str:
    if path in _FORMS:
        return f"curl http://127.0.0.1:8000{path} {_FORMS[path]}"
    return (
        f"curl -X {method.upper()} http://127.0.0.1:8000{path} \\\n"
        f"  -H 'Content-Type: application/json' -d '{_BODIES.get(path, '{}')}'"
    )


def _anchor(method: str, path: str) -> str:
    return html.escape(method + path.replace("/", "-").replace("{", "").replace("}", ""))


def _text(value: object) -> str:
    return html.escape(str(value))
