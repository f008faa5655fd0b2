"""The live page and the JSON behind it, without a browser: who may see what, and what is in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import StartServer

PAGE = Path(__file__).resolve().parents[2] / "octavo" / "server" / "page"
OPERATOR, TENANT = "operator-key", "tenant-key"


def key(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def test_the_page_is_whole_and_needs_nothing_from_outside(start_server: StartServer) -> None:
    url = start_server().url
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not [name for name, _ in attrs if name in ("style", "onclick")], tag
            found.extend(v for name, v in attrs if name in ("href", "src") and v)

    Links().feed(page.text)
    assert {"live.css", "live.js", "docs"} <= set(found)
    for link in found:
        if not link.startswith("data:"):
            assert httpx.get(f"{url}/{link}").status_code == 200
    assert httpx.get(f"{url}/live.js").headers["content-type"].startswith("text/javascript")


def test_no_file_of_the_page_names_another_host_or_makes_html_of_text() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|eval\(", text), path
        assert len(text) < 16_384, path


def test_every_element_that_the_script_names_is_in_the_page() -> None:
    script = (PAGE / "live.js").read_text(encoding="utf-8")
    page = (PAGE / "live.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([\w-]+)"', page))
    named = set(re.findall(r'\$\("([\w-]+)"\)', script))
    named |= set(re.findall(r'(?:table|rows)\("([\w-]+)"', script))
    tiles = set(re.findall(r'line\("(\w+)"', script))
    assert len(tiles) == 6
    assert named | tiles | {f"{tile}-line" for tile in tiles} <= ids


def test_only_the_operator_is_told(start_server: StartServer) -> None:
    url = start_server(api_key=(TENANT,), operator_key=(OPERATOR,)).url
    assert httpx.get(f"{url}/").status_code == 200
    assert httpx.get(f"{url}/live").status_code == 401
    assert httpx.get(f"{url}/live", headers=key(TENANT)).status_code == 403
    told = httpx.get(f"{url}/live", headers=key(OPERATOR)).json()
    assert told["model"] == "fake"
    assert told["plan"] is None
    assert told["engine"]["num_blocks"] == 8


def test_an_engine_that_does_not_answer_is_a_503(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.server.routes.live.LIVE_SECONDS", 0.1)
    server = start_server()
    server.engine.is_hung = True
    answer = httpx.get(f"{server.url}/live")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_busy"
    server.engine.is_hung = False
    server.engine.is_dead = True
    assert httpx.get(f"{server.url}/live").status_code == 503
    server.engine.is_dead = False
