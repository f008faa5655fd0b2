"""The description of the API: complete, true, and readable without anything from outside."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from octavo.config import ServerConfig
from octavo.server.tenants.callers import ALL_SCOPES
from octavo.server.tenants.route_scopes import OPEN, RouteScopes
from octavo.server.wrong_paths import UNSUPPORTED
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_engine import tiny_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAMED = (CHAT, TEXT, "/v1/messages", "/invocations", "/v1/responses")
USER = [{"role": "user", "content": "Hello"}]
PLAIN = {"/metrics": "text/plain", "/v1/files/{file_id}/content": "application/octet-stream"}
"""What routes answer that answer no JSON."""
MANY_EXAMPLES, FEW_EXAMPLES = 20, 8


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/openapi.json").json()


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") and "properties" in schema:
            yield name, schema


def test_every_field_is_described_and_takes_null_unless_it_is_needed(
    document: dict[str, Any],
) -> None:
    found = dict(bodies(document))
    assert {"ChatRequest", "CompletionRequest", "TokenizeChatRequest"} <= set(found)
    for name, schema in found.items():
        assert schema["additionalProperties"] is False
        for field, about in schema["properties"].items():
            assert about["description"], f"{name}.{field}"
            kinds = about.get("anyOf", [{}] if about.keys() == {"description"} else [about])
            if field not in schema.get("required", ()):
                assert {} in kinds or {"type": "null"} in kinds, f"{name}.{field}"


def test_every_number_has_bounds(document: dict[str, Any]) -> None:
    for name, schema in bodies(document):
        for field, about in schema["properties"].items():
            for kind in about.get("anyOf", [about]):
                if kind.get("type") in ("integer", "number"):
                    assert {"minimum", "maximum"} <= {*kind, *about}, f"{name}.{field}"


def test_every_status_has_its_types(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                [*kinds] = response["content"]
                streams = path in STREAMED and status == "200"
                plain = [PLAIN.get(path, "application/json")]
                usual = plain if status == "200" else ["application/json"]
                assert kinds == (["application/json", "text/event-stream"] if streams else usual)
    assert {"400", "404", "413", "503"} <= set(document["paths"][CHAT]["post"]["responses"])


def test_keys_and_what_needs_none_are_told(start_server: Any) -> None:
    server = start_server(api_key=("key",), allow_priority="-3..4")
    document = httpx.get(
        f"{server.url}/openapi.json", headers={"Authorization": "Bearer key"}
    ).json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            is_open = path in ("/health", "/ready", "/ping")
            assert ("security" in operation) != is_open, path
            assert ("401" in operation["responses"]) != is_open, path
            is_for_some = RouteScopes().needed(path) not in (OPEN, ALL_SCOPES)
            assert ("403" in operation["responses"]) == is_for_some, path
    priority = document["components"]["schemas"]["ChatRequest"]["properties"]["priority"]
    assert priority["anyOf"][0] == {"type": "integer", "minimum": -3, "maximum": 4}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("logprobs", [False, True])
def test_answers_are_as_described(
    http: httpx.Client, document: dict[str, Any], path: str, logprobs: bool
) -> None:
    body: dict[str, Any] = {"max_tokens": 3, "return_token_ids": True, "prompt_logprobs": 1, "n": 2}
    if path == CHAT:
        body |= {"messages": USER, "logprobs": logprobs, "top_logprobs": 2 if logprobs else None}
    else:
        body |= {"prompt": "Hello", "logprobs": 2 if logprobs else None, "echo": True}
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    name = {CHAT: "ChatCompletion", TEXT: "Completion"}[path]
    jsonschema_rs.validate(document["components"]["schemas"][name], answer.json())


class _References(html.parser.HTMLParser):
    """Collects what a page makes a browser fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_from_outside_and_names_every_field(
    http: httpx.Client, document: dict[str, Any]
) -> None:
    response = http.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = _References()
    page.feed(response.text)
    assert page.found
    # Relative, so that a proxy may put a prefix before the page.
    assert all(one == "openapi.json" or one.startswith("#") for one in page.found)
    for path in document["paths"]:
        assert path in page.text
    for _, schema in bodies(document):
        for field in schema["properties"]:
            assert field in page.text


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/api/v1/chat/completions", CHAT),
        ("/v1/chat/completions/chat/completions", CHAT),
        ("//v1/completions", TEXT),
        ("/models", "/v1/models"),
    ],
)
def test_a_wrong_base_url_gets_the_hint_it_needs(http: httpx.Client, path: str, meant: str) -> None:
    url = httpx.URL(http.base_url).copy_with(raw_path=path.encode())
    error = http.post(url, json={}).json()["error"]
    assert error["code"] == "unknown_route"
    assert f"did you mean {meant}?" in error["message"]
    assert "base_url should end with /v1" in error["message"]


def test_other_wrong_paths_get_theirs(http: httpx.Client) -> None:
    def message(path: str) -> str:
        response = http.post(path, json={})
        assert response.status_code == 404
        return response.json()["error"]["message"]

    assert f"did you mean {CHAT}, without the slash" in message(CHAT + "/")
    assert "did you mean /tokenize?" in message("/v1/tokenize")
    assert f"did you mean {CHAT}?" in message("/v1/chat/completion")
    assert "GET /docs lists all" in message("/nothing")
    assert len(message("/" + "x" * 20_000)) < 300


def test_routes_of_other_servers_are_not_supported_rather_than_unknown(http: httpx.Client) -> None:
    for path in (*UNSUPPORTED, "/v1/audio/speech"):
        response = http.post(path, json={})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "unsupported_route"), path
        assert f"POST {path} is not supported: " in error["message"]


def run_schemathesis(url: str, folder: Path, *options: str) -> None:
    """Runs all its checks; a schema cannot say that a prompt is too long, or a batch over."""
    config, statuses = folder / "schemathesis.toml", '["2xx", 400, 404, 409]'
    config.write_text(f"[checks]\npositive_data_acceptance.expected-statuses = {statuses}\n")
    command = [sys.executable, "-m", "schemathesis.cli", f"--config-file={config}"]
    run = subprocess.run(
        [*command, "run", f"{url}/openapi.json", "--checks=all", "--seed=1", *options],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=folder,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


CHATS = r"^/v1/(chat/completions|messages|responses)"
"""Bodies with the most fields: half of all cases."""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["include", "exclude"])
def test_schemathesis_finds_nothing_against_the_fake_engine(
    start_server: Any, which: str, tmp_path: Path
) -> None:
    server = start_server(api_key=("key",), operator_key=("boss",))
    run_schemathesis(
        server.url,
        tmp_path,
        "--header=Authorization: Bearer boss",
        f"--{which}-path-regex={CHATS}",
        "--phases=coverage,fuzzing",
        f"--max-examples={MANY_EXAMPLES}",
    )


@pytest.mark.slow
def test_schemathesis_finds_nothing_against_a_real_engine(tmp_path: Path) -> None:
    server = ServerThread(tiny_engine(tmp_path, max_model_len=48), ServerConfig(port=0))
    try:
        options = ("--phases=fuzzing", f"--max-examples={FEW_EXAMPLES}")
        run_schemathesis(server.url, tmp_path, *options)
    finally:
        server.end()


def test_the_fake_engine_serves_under_its_name(start_server: Any) -> None:
    names = httpx.get(f"{start_server().url}/openapi.json").json()["components"]["schemas"]
    model = names["CompletionRequest"]["properties"]["model"]
    assert model["anyOf"][0] == {"enum": [FakeEngine.model_name]}
