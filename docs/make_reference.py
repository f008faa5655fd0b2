"""Writes into the pages of PAGES what the code knows: routes, fields, limits, metrics.

Run by `make docs`, checked by a test.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from fastapi.routing import APIRoute

from docs.blocks import filled, table
from octavo.engine.mailbox import MAX_WAITING_TOKENS
from octavo.observe.metrics import Metrics
from octavo.observe.stats import EngineStats
from octavo.request import SamplingParams
from octavo.request_fields import IGNORED, REFUSED
from octavo.request_limits import (
    MAX_INT,
    MAX_LISTED,
    MAX_PARALLEL_SAMPLES,
    MAX_TEXTS,
)
from octavo.server import routes
from octavo.server.http_protocol import MAX_PIPELINED, ConnectionLimits
from octavo.server.limits import MAX_DEFAULT_BODY_BYTES, TOTAL_BODIES, default_body_bytes
from octavo.server.protocol.chat import MAX_SPECIALS, MAX_TOOLS_CHARS, ChatRequest
from octavo.server.protocol.completions import MAX_PROMPTS, CompletionRequest
from octavo.server.protocol.decoding import MAX_DEPTH
from octavo.server.protocol.messages import MessagesRequest
from octavo.server.protocol.pooling import (
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from octavo.server.protocol.responses import Reasoning, ResponsesRequest, TextFormat
from octavo.server.protocol.sampling import StreamOptions
from octavo.server.protocol.strict import StrictModel
from octavo.server.protocol.tokens import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from octavo.server.uploads import MAX_FILE_BYTES
from octavo.vllm_table import VLLM_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "http.md",
    "messages.md",
    "responses.md",
    "embeddings.md",
    "operating.md",
    "python.md",
    "from_vllm.md",
)
MODELS: dict[str, tuple[type[StrictModel], ...]] = {
    "chat": (ChatRequest,),
    "completions": (CompletionRequest,),
    "stream_options": (StreamOptions,),
    "messages": (MessagesRequest,),
    "responses": (ResponsesRequest,),
    "reasoning": (Reasoning,),
    "text_format": (TextFormat,),
    "embeddings": (EmbeddingRequest,),
    "pooling": (PoolingRequest,),
    "score": (ScoreRequest,),
    "rerank": (RerankRequest,),
    "tokenize": (TokenizeTextRequest, TokenizeChatRequest),
    "detokenize": (DetokenizeRequest,),
}
"""The bodies, as a block's argument calls them."""


def all_routes() -> list[APIRoute]:
    """Returns the routes that the API describes, in the order of the modules' names."""
    modules = [
        importlib.import_module(f"{routes.__name__}.{found.name}")
        for found in pkgutil.iter_modules(routes.__path__)
    ]
    found = [route for module in modules for route in module.router.routes]
    return [route for route in found if isinstance(route, APIRoute) and route.include_in_schema]


def routes_table() -> str:
    """Returns a row a route: what it does, in its own words."""
    rows = []
    for route in all_routes():
        methods = sorted(route.methods - {"HEAD"}) or sorted(route.methods)
        path = re.sub(r":\w+}", "}", route.path)
        said = " ".join((inspect.getdoc(route.endpoint) or "").split("\n\n")[0].split())
        rows.append((f"`{' '.join(methods)} {path}`", said))
    return table(["route", "what it does"], rows)


def fields_table(arguments: list[str]) -> str:
    """Returns a row a field. Arguments: bodies with commas, a colon, the names of fields."""
    bodies = arguments[0].rstrip(":").split(",")
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in arguments[1:]:
        having = [body for body in bodies for row in _rows_of(body, name) if row]
        for body in having:
            for row in _rows_of(body, name):
                where = rows.setdefault((name, *row), [])
                if body not in where:
                    where.append(body)
        if not having:
            raise ValueError(f"no body of {', '.join(bodies)} has a field {name!r}")
    cells = []
    for (name, *row), where in rows.items():
        of = "" if len(where) == len(bodies) else f" ({', '.join(where)})"
        cells.append([f"`{name}`{of}", *row])
    return table(["field", "value", "default", "meaning"], cells)


def names_of(model: type[StrictModel]) -> set[str]:
    """Returns a body's fields as clients write them."""
    return {field.alias or name for name, field in model.model_fields.items()}


def _rows_of(body: str, name: str) -> list[tuple[str, str, str]]:
    found = []
    for model in MODELS[body]:
        schema = model.model_json_schema()
        if name in names_of(model):
            field = schema["properties"][name]
            default = (
                "must be sent"
                if name in schema.get("required", ())
                else _default(name, field, getattr(model, "param_defaults", {}))
            )
            found.append((value_of(field), default, field.get("description", "")))
    return list(dict.fromkeys(found))


def _default(name: str, field: dict[str, Any], others: Mapping[str, Any]) -> str:
    if "default" in field:
        value = field["default"]
        return (
            str(value).lower() if isinstance(value, bool) else f"{value}" if value != "" else '""'
        )
    defaults = {one.name: one.default for one in msgspec.structs.fields(SamplingParams)}
    if name not in defaults or others.get(name, defaults[name]) in (None, ()):
        return ""
    return str(defaults[name]).lower()


def value_of(field: dict[str, Any]) -> str:
    """Returns what a field may hold, in words: `1..64`, `string or list of strings`."""
    limits = {
        key: field[key] for key in ("minimum", "maximum", "additionalProperties") if key in field
    }
    kinds = [one | limits for one in field.get("anyOf", [field]) if one.get("type") != "null"]
    return " or ".join(dict.fromkeys(_kind(kind) for kind in kinds))


def _kind(kind: dict[str, Any]) -> str:
    if "anyOf" in kind:
        return value_of(kind)
    inner = kind.get("additionalProperties")
    if kind.get("type") == "object" and isinstance(inner, dict) and "minimum" in inner:
        return f"object: token id to {_kind(inner)}"
    if "enum" in kind:
        return ", ".join(f'`"{one}"`' for one in kind["enum"])
    if "$ref" in kind:
        return "object"
    if kind.get("type") in ("integer", "number"):
        low, high = kind.get("minimum"), kind.get("maximum")
        if low is None or high is None:
            return kind["type"]
        if high == 2**63 - 1:
            return "integer of 64 bits"
        return f"{_limit(low)}..{_limit(high)}"
    if kind.get("type") == "array":
        return "list of " + _several(kind["items"])
    if kind.get("type") == "string" and "maxLength" in kind:
        return f"string of at most {kind['maxLength']:,}"
    if "pattern" in kind:
        return f"string like `{kind['pattern']}`"
    return {"object": "object", "string": "string", "boolean": "boolean"}[kind["type"]]


def _limit(number: float) -> str:
    if abs(number) == MAX_INT:
        return "2^31-1" if number > 0 else "-2^31+1"
    return f"{number:g}"


def _several(items: dict[str, Any]) -> str:
    if items.get("type") == "integer" and items.get("maximum") == MAX_INT:
        return "token ids"
    if items.get("type") == "array":
        return "lists of " + _several(items["items"])
    return {"string": "strings", "object": "objects"}[items["type"]]


def ignored_list(arguments: list[str]) -> str:
    """Returns the fields that change nothing: of chats, or of the body that is named."""
    names = MODELS[arguments[0]][0].ignored_fields if arguments else IGNORED
    return ", ".join(f"`{name}`" for name in sorted(names)) + "."


def refused_table(arguments: list[str]) -> str:
    """Returns a row a reason: the fields that are refused for it, in chats, or in the body that is
    named beyond those."""
    reasons: dict[str, list[str]] = {}
    refused = REFUSED
    if arguments:
        model = MODELS[arguments[0]][0]
        added = model.refused_fields.keys() - REFUSED.keys() - model.model_fields.keys()
        refused = {
            name: model.refused_fields[name] for name in model.refused_fields if name in added
        }
    for name, (reason, _) in refused.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return table(
        ["field", "why, and what instead"], [(", ".join(n), r) for r, n in reasons.items()]
    )


PYTHON_ALONE = {
    "detokenize": ("boolean", "Make text; false: token ids alone."),
    "max_tokens": (
        "1..2^31-1 or None",
        "Tokens of the answer at most; None: what the context has.",
    ),
    "stop": ("string or sequence of strings", "Texts that end the answer."),
}
"""Fields of SamplingParams that HTTP has not, or has otherwise: value and meaning."""


def params_table() -> str:
    """Returns a row a field of SamplingParams, in the words of the HTTP API."""
    schema = CompletionRequest.model_json_schema()["properties"]
    rows = []
    for field in msgspec.structs.fields(SamplingParams):
        if field.name == "bad_words_token_ids":  # filled in by the tokenizer
            continue
        value, said = PYTHON_ALONE.get(field.name) or (
            value_of(schema[field.name]),
            schema[field.name]["description"],
        )
        rows.append((f"`{field.name}`", value, f"`{field.default!r}`", said))
    return table(["field", "value", "default", "meaning"], rows)


def vllm_table() -> str:
    """Returns a row a reason: vLLM's options, and which values of theirs are taken."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for option in VLLM_OPTIONS.values():
        taken = ", ".join(f"`{json.dumps(value)}`" for value in option.neutral)
        reasons.setdefault((taken, option.reason), []).append(f"`{option.flag}`")
    rows = ((", ".join(flags), taken, reason) for (taken, reason), flags in reasons.items())
    return table(["option", "taken values", "else refused, because"], rows)


def limits_table() -> str:
    """Returns a row a limit of one request or connection."""
    connection = ConnectionLimits()
    usual = (
        f"{default_body_bytes(0):,} bytes and {default_body_bytes(1) - default_body_bytes(0)} a "
        f"token of the context, {MAX_DEFAULT_BODY_BYTES:,} at most; `--max-body-bytes`"
    )
    rows = [
        ("body of a request", usual),
        ("bodies that are being received, together", f"{TOTAL_BODIES} times that, then 503"),
        ("prompts in one call to completions", f"{MAX_PROMPTS:,}"),
        ("`n`", f"{MAX_PARALLEL_SAMPLES}"),
        ("ids in `logit_bias`, `allowed_token_ids`, `stop_token_ids`", f"{MAX_LISTED:,}"),
        *(
            (f"texts in `{name}`", f"{most:,}, of {chars:,} characters in all")
            for name, (most, chars) in MAX_TEXTS.items()
        ),
        ("JSON of all `tools` in a body of more than 64 KiB", f"{MAX_TOOLS_CHARS:,} characters"),
        ("spellings of special tokens in such a chat", f"{MAX_SPECIALS:,}"),
        ("tokens that a reader may be behind its stream", f"{MAX_WAITING_TOKENS:,}"),
        ("levels of lists and objects in a body", f"{MAX_DEPTH}"),
        ("line and headers of a request", f"{connection.max_header_bytes:,} bytes"),
        ("headers of a request", f"{connection.max_headers}"),
        ("time for the headers to come", f"{connection.header_seconds:g} s"),
        ("time for each 4 MiB of the body to come", f"{connection.body_seconds:g} s"),
        ("an uploaded file", f"{MAX_FILE_BYTES:,} bytes"),
        ("time that an idle connection is kept", f"{connection.idle_seconds:g} s"),
        ("time that a client may read nothing of its answer", f"{connection.unread_seconds:g} s"),
        ("connections", f"{connection.max_connections:,}"),
        ("requests that wait on one connection (pipelined)", f"{MAX_PIPELINED}"),
    ]
    return table(["limit", "value"], rows)


def metrics_table() -> str:
    """Returns a row a family of metrics, without its prefix."""
    text = Metrics("model", 1024).render(EngineStats()).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, said in re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE):
        prefix, _, bare = name.rpartition(":")
        if not bare.endswith("_created"):
            rows.setdefault((bare, kinds[name], said), []).append(f"`{prefix}:`" if prefix else "")
    cells = [(f"`{bare}`", kind, ", ".join(p), said) for (bare, kind, said), p in rows.items()]
    return table(["metric", "kind", "prefix", "meaning"], cells)


def render() -> dict[Path, str]:
    """Returns the pages: path -> text."""
    makers = {
        "routes": lambda _: routes_table(),
        "fields": fields_table,
        "ignored": ignored_list,
        "refused": refused_table,
        "params": lambda _: params_table(),
        "vllm": lambda _: vllm_table(),
        "limits": lambda _: limits_table(),
        "metrics": lambda _: metrics_table(),
    }
    pages = [ROOT / "docs" / name for name in PAGES]
    return {page: filled(page.read_text(encoding="utf-8"), makers) for page in pages}


if __name__ == "__main__":
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
