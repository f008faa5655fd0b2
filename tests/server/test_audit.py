"""The audit log: a line for whoever asked, with sizes and what was decided; texts if asked for."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.serve import bind

KEYS = {"alice": "key-of-alice", "ops": "key-of-ops"}
SECRET = "my very own words"


@pytest.fixture
def audited(start_server: Any, tmp_path: Path) -> Any:
    """A server with keys and an audit log."""
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    keys = [
        {"name": "alice", "tenant": "research", "hash": f"sha256:{hashes['alice']}"},
        {"name": "ops", "scopes": ["metrics"], "hash": f"sha256:{hashes['ops']}"},
    ]
    tenants = {"research": {"requests_per_minute": 3}}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys, "tenants": tenants}))

    def start(**options: Any) -> Any:
        return start_server(
            keys=str(tmp_path / "keys.json"),
            audit_log=str(tmp_path / "audit"),
            served_model_name=("m",),
            store_dir=str(tmp_path / "store"),
            **options,
        )

    return start


def ask(server: Any, key: str = "alice", **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS.get(key, key)}"}
    body = {"prompt": SECRET, "max_tokens": 5, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)


def lines_of(server: Any, tmp_path: Path) -> list[dict[str, Any]]:
    server.end()
    return [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]


def test_a_line_tells_who_asked_for_what_and_how_much_it_was(audited: Any, tmp_path: Path) -> None:
    server = audited()
    response = ask(server)
    ask(server, stream=True)
    whole, streamed = lines_of(server, tmp_path)
    expected = {
        "request_id": response.headers["x-request-id"],
        "tenant": "research",
        "key": "alice",
        "method": "POST",
        "route": "/v1/completions",
        "model": "m",
        "status": 200,
        "decision": "served",
        "prompt_tokens": 1 + len(SECRET),
        "cached_tokens": 16,
        "output_tokens": 5,
        "body_bytes": len(response.request.content),
        "answer_bytes": len(response.content),
    }
    assert {name: whole.get(name) for name in expected} == expected
    assert whole["client"].startswith("127.0.0.1:")
    assert whole["seconds"] > 0
    assert whole["time"].endswith("+00:00")
    assert (streamed["output_tokens"], streamed["decision"]) == (5, "served")
    text = (tmp_path / "audit").read_text()
    assert SECRET not in text
    assert not any(key in text for key in KEYS.values())


def test_a_line_tells_who_refused_and_why(audited: Any, tmp_path: Path) -> None:
    server = audited(guard="tests.server.guards.judges:strict")
    ask(server, "unknown")
    ask(server, "ops")
    ask(server, prompt="bad")
    ask(server, nonsense=1)
    for _ in range(4):
        ask(server)

    body = {"messages": [{"role": "user", "content": "bad"}], "max_tokens": 5}
    httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": KEYS["alice"]})
    httpx.get(f"{server.url}/v1/files/x/content")
    lines = lines_of(server, tmp_path)
    *lines, messages, stored = lines
    assert (messages["refused_by"], messages["code"]) == ("budget", "rate_limit_exceeded")
    assert (messages["route"], messages["status"]) == ("/v1/messages", 429)
    assert (stored["refused_by"], stored["route"]) == ("key", "/v1/files/{file_id}/content")
    assert {one["route"] for one in lines} == {"/v1/completions"}
    told = [(one["decision"], one.get("refused_by")) for one in lines]
    assert told[:4] == [
        ("refused", "key"),
        ("refused", "scope"),
        ("refused", "guard"),
        ("invalid", None),
    ]
    assert told[-1] == ("refused", "budget")
    assert set(told[4:-1]) <= {("served", None), ("refused", "budget")}


def test_what_the_guard_did_to_an_answer_is_told(audited: Any, tmp_path: Path) -> None:
    server = audited(guard="tests.server.guards.judges:strict")
    server.engine.answer = "bad"
    ask(server)
    [line] = lines_of(server, tmp_path)
    assert (line["status"], line["decision"], line["refused_by"]) == (200, "refused", "guard")
    assert line["guard"] == {"output_refused": 1}


def test_a_response_in_the_background_has_one_line_with_its_tokens(
    audited: Any, tmp_path: Path
) -> None:
    server = audited()
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    body = {"input": SECRET, "background": True, "max_output_tokens": 16}
    httpx.post(f"{server.url}/v1/responses", json=body, headers=headers)
    deadline = time.monotonic() + 10
    while not (tmp_path / "audit").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    [line] = lines_of(server, tmp_path)
    assert (line["route"], line["decision"], line["output_tokens"]) == (
        "/v1/responses",
        "served",
        16,
    )


def test_texts_are_kept_if_they_are_asked_for(audited: Any, tmp_path: Path) -> None:
    server = audited(audit_log_text=True)
    server.engine.answer = "hello"
    response = ask(server, n=2)
    ask(server, stream=True)
    whole, streamed = lines_of(server, tmp_path)
    assert json.loads(whole["sent"]) == json.loads(response.request.content)
    assert whole["told"] == {"0": "hello", "1": "hello"}
    assert streamed["told"] == {"0": "hello"}


def test_probes_are_not_audited_and_lines_of_batches_are(audited: Any, tmp_path: Path) -> None:
    server = audited()
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    body = {"prompt": SECRET, "max_tokens": 5}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        http.get("/health")
        files = {"file": ("x.jsonl", json.dumps(line).encode())}
        file = http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
        batch = http.post("/v1/batches", json={**asked, "completion_window": "24h"}).json()
        deadline = time.monotonic() + 30
        while http.get(f"/v1/batches/{batch['id']}").json()["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    found = lines_of(server, tmp_path)
    assert not [one for one in found if one["route"] == "/health"]
    [of_line] = [one for one in found if one["key"] == "batch"]
    assert (of_line["tenant"], of_line["route"]) == ("research", "/v1/completions")
    assert (of_line["output_tokens"], of_line["decision"]) == (5, "served")
    routes = {one["route"] for one in found}
    assert {"/v1/files", "/v1/batches", "/v1/batches/{batch_id}"} <= routes


def test_its_lines_are_counted(start_server: Any, tmp_path: Path) -> None:
    server = start_server(audit_log=str(tmp_path / "audit"))
    httpx.get(f"{server.url}/v1/models")
    page = httpx.get(f"{server.url}/metrics").text
    assert 'octavo:audit_lines_total{outcome="taken"} 1.0' in page
    assert 'octavo:audit_lines_total{outcome="dropped"} 0.0' in page


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"audit_log": "/nowhere/audit"}, "audit_log"),
        ({"audit_log": "/"}, "audit_log"),
        ({"audit_log_text": True}, "audit_log_text"),
    ],
)
def test_a_log_that_cannot_be_written_ends_the_start(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        bind(ServerConfig(port=0, **options).resolve())


@pytest.mark.parametrize("is_read", [False, True])
def test_a_log_that_is_no_regular_file_ends_the_start(tmp_path: Path, is_read: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) if is_read else None
    refused: list[str] = []

    def start() -> None:
        try:
            bind(ServerConfig(port=0, audit_log=str(pipe)).resolve())
        except ConfigError as error:
            refused.append(str(error))

    thread = threading.Thread(target=start, daemon=True)  # which may wait for ever for a reader
    thread.start()
    thread.join(10)
    if reader is not None:
        os.close(reader)
    assert refused == [
        f"audit_log {pipe} cannot be written (it is no regular file); give another path"
    ]
