"""The log line of an exchange: why it failed, what it took, who asked."""

from __future__ import annotations

import json
import logging
import re
import socket
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.observe.logs import JsonFormatter
from octavo.observe.metrics import Metrics
from octavo.server.access import AccessMiddleware
from octavo.server.exchange import Exchange

ACCESS = "octavo.server.access"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == ACCESS]


async def ask(app: Starlette) -> None:
    transport = httpx.ASGITransport(AccessMiddleware(app, Metrics("m", 8)), client=("1.2.3.4", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        await client.post("/v1/x")


async def test_a_line_tells_the_tokens_and_times_of_a_generation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def generate(request: Request) -> Response:
        exchange = request.state.exchange
        assert isinstance(exchange, Exchange)
        exchange.num_prompt_tokens, exchange.num_cached_tokens = 36, 32
        exchange.first_token_seconds = 0.0
        exchange.num_output_tokens = 7
        return Response("{}")

    caplog.set_level(logging.INFO, ACCESS)
    await ask(Starlette(routes=[Route("/v1/x", generate, methods=["POST"])]))
    [line] = lines(caplog)
    assert line.startswith("1.2.3.4:5 POST '/v1/x' 200 in ")
    assert ", prompt 36 tokens (32 cached), output 7, first after 0." in line
    [record] = [record for record in caplog.records if record.name == ACCESS]
    told = json.loads(JsonFormatter().format(record))
    numbers = ("prompt_tokens", "cached_tokens", "output_tokens", "status")
    assert [told[name] for name in numbers] == [36, 32, 7, 200]
    assert told["first_token_seconds"] <= told["seconds"]


def test_a_line_tells_why_a_request_was_refused(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    server = start_server(api_key=("k",))
    headers = {"Authorization": "Bearer k"}
    for path, body in (("/v1/completions", {"prompt": "x", "n\n": 1}), ("/nowhere", {})):
        httpx.post(f"{server.url}{path}", json=body, headers=headers)
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    server.end()
    unknown, nowhere, keyless = lines(caplog)
    assert " 400 in " in unknown
    assert "\\n" in unknown
    assert "\n" not in unknown
    assert " 404 in " in nowhere
    assert "there is no route" in nowhere
    assert " 401 in " in keyless
    assert "API key" in keyless


def test_a_stream_whose_client_left_is_no_success(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    server = start_server()
    server.engine.is_endless = True
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.engine.aborted.wait(10)
    server.end()
    [line] = lines(caplog)
    assert " 499 in " in line
    assert line.endswith(": the client left before the end")


def test_an_error_within_a_stream_is_told(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    server = start_server()
    server.engine.error_after = (3, ValueError("secret"))
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "stream": True})
    server.end()
    [line] = lines(caplog)
    assert " 200 in " in line
    assert "internal error" in line


def test_endpoints_that_shall_not_be_logged_are_not(
    start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, ACCESS)
    server = start_server(disable_access_log_for_endpoints=("/health", "/v1/models"))
    for path in ("/health", "/v1/models", "/version"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    server.end()
    [line] = lines(caplog)
    assert "'/version'" in line


def test_clients_invent_no_labels(start_server: Any) -> None:
    server = start_server(api_key=("k",), public_metrics=True)
    for path in ("/v1/completions", "/v1/files/file-1", "/nowhere"):
        for method in ("PUT", "PATCH", "TRACE", "PROPFIND"):
            for key in ("k", "wrong"):
                headers = {"Authorization": f"Bearer {key}"}
                told = httpx.request(method, f"{server.url}{path}", headers=headers)
                assert told.status_code in (401, 404, 405)
    page = httpx.get(f"{server.url}/metrics").text
    labels = re.findall(r'http_requests_total\{handler="([^"]+)",method="([^"]+)"', page)
    assert set(labels) == {("none", "PUT"), ("none", "PATCH"), ("none", "other")}
