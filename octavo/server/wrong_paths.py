"""What a client is told that asks for a path which is not there: the mistakes and hopes we know.

Called by the handler of 404s; never redirects.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 128
"""Of a path that is compared with the known ones, or repeated."""

_FEW = 5
"""Routes that are named outright: those of the metrics' port."""

_CLASSES = "use POST /pooling, which gives the probabilities of a classifier"
_COHERE = "Cohere's API of embeddings is not served; use POST /v1/embeddings"
_ADAPTERS = "there are no adapters"
_SLEEP = "the engine does not sleep"
_MEDIA = "only text is served"
_OLLAMA = "this is no Ollama server; OpenAI's API is served, under /v1"

UNSUPPORTED = {
    "/classify": _CLASSES,
    **dict.fromkeys(("/v2/embed", "/embed"), _COHERE),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _ADAPTERS),
    **dict.fromkeys(("/sleep", "/wake_up", "/is_sleeping"), _SLEEP),
    **dict.fromkeys(("/v1/images", "/v1/audio", "/v1/videos", "/v1/realtime"), _MEDIA),
    "/v1/moderations": "the server does not judge texts",
    "/v1/assistants": "assistants are not served; use POST /v1/chat/completions",
    "/v1/threads": "threads are not served; use POST /v1/chat/completions",
    "/v1/fine_tuning": "the engine does not train",
    "/generate": "use POST /v1/completions",
    "/abort_requests": "close the connection of a request, which ends it",
    "/load": "GET /metrics has num_requests_running and num_requests_waiting",
    "/server_info": "GET /version and GET /v1/models tell what is served",
    "/api/chat": _OLLAMA,
    "/api/generate": _OLLAMA,
    "/api/tags": _OLLAMA,
}
"""Routes of other servers, with those below them."""


def explain(method: str, path: str, routes: Iterable[str]) -> tuple[str, str]:
    """Returns message and code for a path that none of `routes` serves."""
    where = f"{method} {path[:_LONGEST]}"
    known = [route for route in routes if "{" not in route]
    if (meant := _meant(path, known)) is not None:
        hint = f"did you mean {meant}?"
        if meant == path.rstrip("/"):
            hint = f"did you mean {meant}, without the slash at its end?"
        elif meant.startswith("/v1/"):
            hint += " A client's base_url should end with /v1, without a slash behind it"
        return f"there is no route for {where}; {hint}", "unknown_route"
    for route in (path, _tidied(path), "/v1" + _tidied(path)):
        for unsupported, reason in UNSUPPORTED.items():
            if route == unsupported or route.startswith(unsupported + "/"):
                return f"{where} is not supported: {reason}", "unsupported_route"
    if _tidied(path) == "/v1":
        hint = "that is the base_url of clients; GET /v1/models lists what is served"
        return f"there is no route for {where}; {hint}", "unknown_route"
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.8) if len(path) <= _LONGEST else []
    listed = "GET /docs lists all" if len(known) > _FEW else f"here are {', '.join(known)}"
    hint = f"did you mean {near[0]}?" if near else listed
    return f"there is no route for {where}; {hint}", "unknown_route"


def _tidied(path: str) -> str:
    """Returns `path` without empty parts, and without all that stands before its last /v1."""
    tidy = "/" + "/".join(part for part in path[: 4 * _LONGEST].split("/") if part)
    before, v1, rest = tidy.rpartition("/v1/")
    return v1 + rest if before or v1 else tidy


def _meant(path: str, known: list[str]) -> str | None:
    tidy = _tidied(path)
    for candidate in (tidy, "/v1" + tidy, tidy.removeprefix("/v1"), "/v1" + _last_two(tidy)):
        if candidate in known and candidate != path:
            return candidate
    return None


def _last_two(path: str) -> str:
    """Returns `/chat/completions` of `/any/thing/chat/completions`."""
    return "/" + "/".join(path.split("/")[-2:])
