"""The live page in a real browser: what it shows of a server under load, and that it keeps up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.browser import browser
from tests.deploy.live_server import OPERATOR, TENANT, live_server, load_on

COLOUR = "return getComputedStyle(document.body).backgroundColor"
WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.slow
def test_the_page_shows_a_server_under_load_and_keeps_up(
    debian_program: Callable[[str, str], str], tmp_path: Path
) -> None:
    chromium = debian_program("chromium", "chromium")
    driver = debian_program("chromedriver", "chromium-driver")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(live_server(tmp_path))
        page = stack.enter_context(browser(driver, chromium))
        page.show(width=1100, height=1500, scheme="light")
        page.open(f"{server.url}/")

        # The door: nothing is told before an operator's key is there.
        page.until("!document.querySelector('#door').hidden")
        assert page.run("return document.querySelector('#all').hidden")
        page.type("#key", TENANT)
        page.until("document.querySelector('#refusal').innerText.includes('operator')")
        page.type("#key", OPERATOR)
        page.until("!document.querySelector('#all').hidden")
        page.complaints()  # refusals are logged as errors

        stack.enter_context(load_on(server.url, 3))
        page.until("Number(document.querySelector('#generated').innerText.replace(',', '')) > 0")
        page.until("document.querySelectorAll('#requests tr').length > 1")
        page.until("document.querySelector('#requests .used')")
        assert page.run("return document.querySelectorAll('#memory span').length") == 6
        assert "weights" in page.text("#memory-legend")
        page.until("document.querySelector('#reasons').innerText.includes('never seen')")
        assert "up to" in page.text("#steps")
        assert "memory plan" in page.text("#plan")
        assert "all tokens" in page.text("#groups")
        page.until("document.querySelector('#experts').width === 4")
        assert page.run("return document.querySelector('#experts').height") == 2
        assert "times the mean" in page.text("#experts-note")

        # It updates by itself.
        count = "document.querySelector('#steps').innerText"
        earlier = page.run(f"return {count}")
        page.until(f"{count} !== {earlier!r}")

        # A phone: nothing is wider than it. Dark: the paper is.
        light = page.run(COLOUR)
        page.show(width=390, height=844, scheme="dark")
        page.until(f"(() => {{ {WIDER} }})() === 0")
        dark = page.run(COLOUR)
        assert light == "rgb(255, 255, 255)"
        assert max(map(int, dark[4:-1].split(","))) < 64

        assert page.complaints() == []
        hosts = page.run(
            "return performance.getEntriesByType('resource').map((one) => new URL(one.name).origin)"
        )
        assert set(hosts) == {server.url}
