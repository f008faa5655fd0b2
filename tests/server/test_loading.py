"""`octavo serve` while its model loads: every port answers at once, whatever is asked.

The engine's process is stopped by a signal, so that the load lasts as long as the test wants.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.server.loading import LoadingPorts
from octavo.server.serve import bind
from tests.server.certificates import make_certificate
from tests.server.serve_process import StartServe

MOMENT = 5.0
"""Far less than the load takes here, which does not end by itself."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def hold_the_load(serve: Any, *ports: int) -> list[int]:
    """Stops what the server has started, the engine's process first of all, and returns it once the
    ports listen."""
    # Not between fork and start, for which the server itself waits.
    serve.await_that(lambda: any(map(has_started, serve.find_children())))
    children = sorted(filter(has_started, serve.find_children()))
    for child in children:
        os.kill(child, signal.SIGSTOP)
    serve.await_that(lambda: all(map(listens, ports)))
    return children


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def has_started(pid: int) -> bool:
    return b"-m\0octavo." in Path(f"/proc/{pid}/cmdline").read_bytes()


def check_refusals(client: httpx.Client) -> None:
    for path in ("/ready", "/health", "/ping", "/metrics", "/v1/models", "/nowhere"):
        told = client.get(path)
        assert told.status_code == 503, path
        assert told.headers["retry-after"] == "1"
        assert told.headers["connection"] == "close"
        assert told.json()["error"]["message"] == "the model loads"
    head = client.head("/ready")
    assert (head.status_code, head.content) == (503, b"")


@pytest.mark.parametrize("num_fronts", [1, 2])
def test_ports_answer_503_while_the_model_loads(start_serve: StartServe, num_fronts: int) -> None:
    ports = free_port(), free_port()
    fronts = ("--api-processes", "2") if num_fronts > 1 else ()
    serve = start_serve("--port", str(ports[0]), "--metrics-port", str(ports[1]), *fronts)
    held = hold_the_load(serve, *ports)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url in urls:
            with httpx.Client(base_url=url, timeout=MOMENT) as client:
                check_refusals(client)
        # A body that is longer than a buffer does not hide the answer.
        sent = httpx.post(f"{urls[0]}/v1/completions", content=b"x" * 2**22, timeout=MOMENT)
        assert sent.status_code == 503
    finally:
        for one in held:
            os.kill(one, signal.SIGCONT)
    told = ask_until_ready(urls)
    assert told <= {200, 503}
    serve.await_url()
    serve.process.terminate()
    assert serve.end() == 0


def ask_until_ready(urls: list[str]) -> set[int]:
    """Returns all that was told; a connection that is refused, cut off or not answered raises."""
    told = set[int]()
    end = time.monotonic() + 90
    for url in urls:
        while True:
            code = httpx.get(f"{url}/ready", timeout=MOMENT).status_code
            told.add(code)
            if code == 200:
                break
            assert time.monotonic() < end
    return told


def test_who_was_accepted_before_the_server_took_over_is_answered() -> None:
    async def ask() -> bytes:
        with bind(ServerConfig(port=0)) as bound:
            ports = LoadingPorts(ServerConfig())
            ports.open(bound, None)
            reader, writer = await asyncio.open_connection(*bound.getsockname())
            writer.write(b"GET /ready HTTP/1.1\r\n")
            await asyncio.sleep(0.1)
            ports.close()
            writer.write(b"Host: x\r\n\r\n")
            told = await asyncio.wait_for(reader.read(), MOMENT)
            assert bound.fileno() >= 0
            writer.close()
            return told

    assert asyncio.run(ask()).startswith(b"HTTP/1.1 503")


def test_https_and_an_end_while_the_model_loads(start_serve: StartServe, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    port = free_port()
    serve = start_serve("--port", str(port), "--ssl-certfile", certificate, "--ssl-keyfile", key)
    held = hold_the_load(serve, port)
    trust = ssl.create_default_context(cafile=certificate)
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=MOMENT) as client:
        check_refusals(client)
    for one in held:
        os.kill(one, signal.SIGCONT)
    serve.process.terminate()
    assert serve.end() == 0
