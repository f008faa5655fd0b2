"""A whole server under mixed load, to see whether anything is lost, leaks or grows.

    python -m benchmarks.server_soak [--seconds 300] [--clients 16] [--api-processes 2]

A tiny model of random weights; keys of two tenants, one with a small budget; a guard that refuses,
rewrites, hangs and fails now and then; an audit log that is moved away; traces for a collector that
is not there; clients that leave. Prints one JSON object; exits with 1 if an answer was not whole, a
word went past the guard, a request has no line in the audit log, something is still open at the
end, or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.process_figures import children_of
from octavo.guard import GuardCheck, Refuse, Rewrite, Verdict
from tests.server.tiny_engine import write_model

ROOT = Path(__file__).resolve().parents[1]
OCTAVO = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]
KEYS = {"large": "key-of-large", "small": "key-of-small", "ops": "key-of-ops"}
WORDS = ["once", "upon", "a", "time", "there", "was", "secret", "forbidden", "stuck", "crash"]
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
EXPECTED = frozenset({200, 400, 429, 503})
ENDS = ("data: [DONE]", '"type":"response.', '"type":"message_stop"', '"type":"error"', '"error"')
GROWTH_MIB = 24
"""That memory may grow by in the second half, of each process: what caches fill up with."""


async def judge(check: GuardCheck) -> Verdict:
    """The guard of this soak."""
    texts = [one.text for one in check.texts]
    words = {word for text in texts for word in text.split()}
    if check.stage == "output":
        return Rewrite([text.replace("e", "3") for text in texts])
    if "stuck" in words:
        await asyncio.sleep(60)
    if "crash" in words:
        raise ValueError("crash")
    if "forbidden" in words:
        return Refuse("a forbidden word")
    return Rewrite(
        [
            text if one.is_fixed else text.replace("secret", "name")
            for one, text in zip(check.texts, texts, strict=True)
        ]
    )


def key_file(folder: Path) -> Path:
    """Writes keys and tenants."""
    keys = [
        {"name": name, "hash": f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"}
        for name, key in KEYS.items()
    ]
    keys[2]["scopes"] = ["metrics"]  # type: ignore[assignment]
    tenants = {"small": {"requests_per_minute": 60, "max_concurrent": 2}}
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": keys, "tenants": tenants}))
    return path


@contextlib.contextmanager
def served(folder: Path, fronts: int) -> Iterator[tuple[str, int]]:
    """Yields the URL and the process of the server."""
    model = folder / "model"
    model.mkdir()
    options = (
        f"--load-format dummy --device cpu --num-threads 1 --max-model-len 512 --port 0 "
        f"--kv-cache-memory 4MiB --max-num-seqs 8 --api-processes {fronts} "
        f"--keys {key_file(folder)} --audit-log {folder / 'audit'} --store-dir {folder / 'store'} "
        f"--guard benchmarks.server_soak:judge --guard-timeout 0.5 --guard-max-concurrent 8 "
        f"--guard-window 8 --otlp-traces-endpoint http://127.0.0.1:9 --log-level warning "
        f"--otlp-traces-sampling 0.3"
    )
    log = folder / "log"
    command = [*OCTAVO, "serve", str(write_model(model)), "--dtype", "float32", *options.split()]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file)
    try:
        while not (found := re.search(r" is served on (http://\S+)", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Load:
    """Clients that ask, read or leave."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._draw = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.num_sent = 0

    async def run(self, num_clients: int, deadline: float) -> None:
        limits = httpx.Limits(max_connections=num_clients)
        async with (
            httpx.AsyncClient(base_url=self._url, limits=limits, timeout=120) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(num_clients):
                group.create_task(self._client(http, deadline))

    async def _client(self, http: httpx.AsyncClient, deadline: float) -> None:
        while time.monotonic() < deadline:
            await self._ask(http)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        draw = self._draw
        route, name = draw.choice(ROUTES), draw.choice(("large", "large", "small"))
        text = " ".join(
            draw.choices(WORDS, [9, 9, 9, 9, 9, 9, 3, 1, 0.3, 0.5], k=draw.randint(2, 20))
        )
        body = body_of(route, text, draw.randint(1, 60), draw.random() < 0.6)
        leaves_after = draw.randint(0, 5) if draw.random() < 0.2 else None
        self.num_sent += 1
        request = http.build_request(
            "POST", route, json=body, headers={"Authorization": f"Bearer {KEYS[name]}"}
        )
        answer = await http.send(request, stream=True)
        try:
            self.outcomes[f"{answer.status_code}"] += 1
            if answer.status_code not in EXPECTED:
                self.problems[f"status {answer.status_code}"] += 1
            told, num_pieces = "", 0
            async for piece in answer.aiter_text():
                told += piece
                num_pieces += 1
                if leaves_after is not None and num_pieces > leaves_after:
                    self.outcomes["left"] += 1
                    return
            self._check(answer.status_code, bool(body["stream"]), text, told)
        except httpx.HTTPError as error:
            self.problems[type(error).__name__] += 1
        finally:
            await answer.aclose()

    def _check(self, status: int, is_stream: bool, text: str, told: str) -> None:
        if status == 200 and "forbidden" in text.split():
            self.problems["a refused prompt was served"] += 1
        if status == 200 and is_stream and not any(end in told[-4000:] for end in ENDS):
            self.problems["a stream that does not end"] += 1
        if status == 200 and not is_stream and not isinstance(json.loads(told), dict):
            self.problems["an answer that is no object"] += 1


def body_of(route: str, text: str, max_tokens: int, stream: bool) -> dict[str, Any]:
    """Returns what a route is asked."""
    body: dict[str, Any] = {"stream": stream}
    if route == "/v1/completions":
        return {**body, "prompt": text, "max_tokens": max_tokens, "n": 1 + max_tokens % 2}
    if route == "/v1/responses":
        return {**body, "input": text, "max_output_tokens": max(16, max_tokens)}
    return {**body, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}


def memory(parent: int) -> dict[int, float]:
    """Returns MiB of each process of a server."""
    found = {}
    for pid in [parent, *children_of(parent)]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found[pid] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return found


def numbers(url: str) -> dict[str, float]:
    """Returns the sums of the server's series by name."""
    headers = {"Authorization": f"Bearer {KEYS['ops']}"}
    found: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics", headers=headers, timeout=60).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
    return dict(found)


def audited(folder: Path) -> Counter[str]:
    """Returns decisions of all lines of generating routes, in the file and the one moved away."""
    found: Counter[str] = Counter()
    for path in folder.glob("audit*"):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            if "dropped_lines" in one:
                found["dropped"] += one["dropped_lines"]
            elif one["route"] in ROUTES:
                found[one["decision"]] += 1
    return found


def soak(seconds: float, num_clients: int, fronts: int, seed: int) -> dict[str, Any]:
    """Returns the account of a run; `ok` says whether all is well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(folder, fronts) as (url, parent):
            load, began = Load(url, seed), time.monotonic()
            asyncio.run(load.run(num_clients, began + seconds / 2))
            (folder / "audit").rename(folder / "audit.1")
            before = memory(parent)
            asyncio.run(load.run(num_clients, began + seconds))
            end = time.monotonic() + 30
            names = ("octavo:num_requests_running", "octavo:num_requests_waiting")
            open_names = (*names, "octavo:guard_checks_running", "octavo:guard_checks_waiting")
            while any((now := numbers(url)).get(one) for one in open_names):
                if time.monotonic() > end:
                    load.problems["still open at the end"] += 1
                    break
                time.sleep(0.2)
            after = memory(parent)
            growth = {pid: after[pid] - before[pid] for pid in before if pid in after}
        lines = audited(folder)
    if len(growth) != len(before):
        load.problems["processes that ended"] += 1
    if any(one > GROWTH_MIB for one in growth.values()):
        load.problems["memory grew"] += 1
    if sum(lines.values()) != load.num_sent:
        load.problems["requests without a line"] += 1
    return {
        "seconds": round(seconds),
        "requests": load.num_sent,
        "outcomes": dict(load.outcomes),
        "audited": dict(lines),
        "guard_checks": now.get("octavo:guard_checks_total"),
        "tokens": now.get("octavo:generation_tokens_total"),
        "growth_mib": [round(one, 1) for one in growth.values()],
        "problems": dict(load.problems),
        "ok": not load.problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--api-processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    account = soak(args.seconds, args.clients, args.api_processes, args.seed)
    print(json.dumps(account))
    return 0 if account["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
