"""HTTPS: a certificate serves, is read again when it changes, and is refused early if broken."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.serve import bind
from octavo.server.tls import keep_fresh
from tests.server.certificates import make_certificate


def test_a_certificate_serves_https(start_server: Any, tmp_path: Path):
    certificate, key = make_certificate(tmp_path)
    server = start_server(ssl_certfile=certificate, ssl_keyfile=key)
    trust = ssl.create_default_context(cafile=certificate)
    url = server.url.replace("http://", "https://")
    with httpx.Client(base_url=url, verify=trust) as client:
        assert client.get("/health").status_code == 200
        body = {"prompt": "x", "max_tokens": 3, "stream": True}
        streamed = client.post("/v1/completions", json=body)
        assert streamed.text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize("broken", ["missing", "no key", "not PEM", "another's key"])
def test_what_cannot_serve_is_refused_before_the_port_is_taken(tmp_path: Path, broken: str):
    certificate, key = make_certificate(tmp_path)
    if broken == "missing":
        Path(certificate).unlink()
    elif broken == "no key":
        key = certificate
    elif broken == "not PEM":
        Path(certificate).write_text("hello")
    else:
        other = tmp_path / "other"
        other.mkdir()
        key = make_certificate(other)[1]
    with pytest.raises(ConfigError, match="ssl_certfile"):
        bind(ServerConfig(port=0, ssl_certfile=certificate, ssl_keyfile=key).resolve())


async def shown_by(port: int) -> int:
    """Returns a mark of the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hash(shown)


async def test_a_changed_certificate_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    certificate, key = make_certificate(tmp_path)
    config = ServerConfig(ssl_certfile=certificate, ssl_keyfile=key, enable_ssl_refresh=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", ssl=context)
    port = server.sockets[0].getsockname()[1]
    task = asyncio.create_task(keep_fresh(context, config, 0.02))
    try:
        first = await shown_by(port)
        make_certificate(tmp_path, "renewed")
        while (second := await shown_by(port)) == first:
            await asyncio.sleep(0.02)
        Path(certificate).write_text("broken")
        while "the changed certificate is not used" not in caplog.text:
            await asyncio.sleep(0.02)
        assert await shown_by(port) == second
    finally:
        task.cancel()
        server.close()
        await server.wait_closed()
