"""Chromium without a window, driven over WebDriver's plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
SECONDS = 60.0
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--disable-background-networking", "--no-first-run"),
)


class Browser:
    """One page."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def _do(self, method: str, path: str, **body: Any) -> Any:
        answer = self._client.request(
            method, f"/session/{self._session}/{path}", json=body if method == "POST" else None
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self._do("POST", "url", url=url)

    def run(self, script: str) -> Any:
        """Returns what a function with this body gives."""
        return self._do("POST", "execute/sync", script=script, args=[])

    def text(self, css: str) -> str:
        return self.run(f"return document.querySelector({css!r}).innerText")

    def type(self, css: str, text: str) -> None:
        """Types into an empty field and presses Enter."""
        found = self._do("POST", "element", **{"using": "css selector", "value": css})
        self._do("POST", f"element/{found[ELEMENT]}/clear")
        self._do("POST", f"element/{found[ELEMENT]}/value", text=text + "\ue007")

    def until(self, script: str) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.run(f"return Boolean({script})"):
            assert time.monotonic() < deadline, (script, self.run("return document.body.innerText"))
            time.sleep(0.1)

    def show(self, *, width: int, height: int, scheme: str) -> None:
        """Makes the page so large, in CSS pixels, and light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})

    def _command(self, name: str, params: dict[str, Any]) -> None:
        self._do("POST", "goog/cdp/execute", cmd=name, params=params)

    def complaints(self) -> list[str]:
        """Returns what the browser logged of errors since the last call."""
        entries = self._do("POST", "se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._do("GET", "screenshot")))


@contextlib.contextmanager
def browser(driver: str, chromium: str) -> Iterator[Browser]:
    """Starts Chromium by its driver, and ends both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        (driver, f"--port={port}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": chromium, "args": list(ARGUMENTS)},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            deadline = time.monotonic() + SECONDS
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/status").json()["value"]["ready"]:
                        break
                assert time.monotonic() < deadline, "the driver does not start"
                time.sleep(0.1)
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert answer.status_code == 200, answer.text
            session = answer.json()["value"]["sessionId"]
            try:
                yield Browser(client, session)
            finally:
                client.delete(f"/session/{session}")
    finally:
        process.terminate()
        process.wait(20)
