"""A fleet of two engines under load for a long time, of which one is killed every few minutes.

    python -m benchmarks.fleet_soak demo [--seconds 3600] [--kill-every 180] [--clients 6]

Clients ask over HTTP, half of them for streams, greedily: whatever is answered must be what the
same prompt was answered at first, and whatever is not must be a clear error. Prints a JSON object;
exits with 1 if a request did not end, ended twice or with another text, if an error says nothing
of a death, or if the server's own process grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.process_figures import children_of, resident_bytes

RUN_OCTAVO = "import sys; from octavo.cli import main; sys.exit(main())"
START_SECONDS = 600.0
NUM_PROMPTS = 24
MAX_GROWTH = 0.1
"""Of the front's memory, from the first quarter to the last."""
CLEAR = {"engine_dead", "overloaded"}
"""Codes of errors that a death may cause."""
REQUEST_SECONDS = 300.0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--kill-every", type=float, default=180.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser


@contextlib.contextmanager
def fleet(model: str, log: Path) -> Iterator[tuple[str, int]]:
    """Yields the address and the process of a server with two engines."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-c", RUN_OCTAVO, "serve", model, "--data-parallel-size", "2"),
        *("--device", "cpu", "--num-threads", "1", "--max-model-len", "512", "--deterministic"),
        *("--kv-cache-memory-bytes", "64MiB", "--max-num-seqs", "8", "--port", str(port)),
        *("--max-store-bytes", "0", "--log-level", "warning"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            if not wait_until_ready(url, process):
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return True
        time.sleep(0.2)
    return False


def ask(client: httpx.Client, url: str, prompt: str, max_tokens: int) -> tuple[str, str]:
    """Returns a text and how it ended: the finish reason, or the code of an error."""
    answer = client.post(f"{url}/v1/completions", json=_body(prompt, max_tokens, False))
    told = answer.json()
    if answer.status_code != 200:
        return "", told["error"]["code"]
    (choice,) = told["choices"]
    return choice["text"], choice["finish_reason"]


def ask_for_stream(client: httpx.Client, url: str, prompt: str, max_tokens: int) -> tuple[str, str]:
    """The same of a stream; an end that is none, or two, is an end of its own."""
    text, ends = "", list[str]()
    body = _body(prompt, max_tokens, True)
    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return "", json.loads(answer.read())["error"]["code"]
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                ends.append(event["error"]["code"])
                continue
            (choice,) = event["choices"]
            text += choice["text"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, ends[0] if len(ends) == 1 else f"{len(ends)} ends"


def _body(prompt: str, max_tokens: int, stream: bool) -> dict[str, Any]:
    fixed = {"temperature": 0, "ignore_eos": True, "stream": stream}
    return {"prompt": prompt, "max_tokens": max_tokens, **fixed}


class Soak:
    """The clients, and what they were told."""

    def __init__(self, url: str, max_tokens: int, seed: int) -> None:
        self._url = url
        self._max_tokens = max_tokens
        self._seed = seed
        self._lock = threading.Lock()
        self.is_over = threading.Event()
        self.num_asked = 0
        self.ends: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.prompts = [
            f"Tale {number % 6} of the harbour. " * 6 + f"Chapter {number}:"
            for number in range(NUM_PROMPTS)
        ]
        with httpx.Client(timeout=REQUEST_SECONDS) as client:
            told = [ask(client, url, prompt, max_tokens) for prompt in self.prompts]
        self._expected = [text for text, _ in told]

    def run_client(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        way = ask_for_stream if number % 2 else ask
        with httpx.Client(timeout=REQUEST_SECONDS) as client:
            while not self.is_over.is_set():
                place = rng.randrange(NUM_PROMPTS)
                with self._lock:
                    self.num_asked += 1
                try:
                    text, end = way(client, self._url, self.prompts[place], self._max_tokens)
                except (httpx.HTTPError, ValueError) as error:
                    text, end = "", type(error).__name__
                with self._lock:
                    self._note(place, text, end)

    def _note(self, place: int, text: str, end: str) -> None:
        self.ends[end] += 1
        if end == "length":
            if text != self._expected[place]:
                self.problems["another text than at first"] += 1
        elif end not in CLEAR:
            self.problems[f"ended with {end}"] += 1
        elif not self._expected[place].startswith(text):
            self.problems["another beginning than at first"] += 1


def engines_of(pid: int) -> list[int]:
    """Returns the engine processes of a server."""
    found: list[int] = []
    for child in children_of(pid):
        with contextlib.suppress(OSError):
            if b"octavo.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def num_up(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    ups = [line for line in text.splitlines() if line.startswith("octavo:engine_up{")]
    return int(sum(float(line.rpartition(" ")[2]) for line in ups))


def main() -> int:
    args = options().parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, fleet(args.model, Path(folder) / "log") as up:
        url, pid = up
        soak = Soak(url, args.max_tokens, args.seed)
        clients = [
            threading.Thread(target=soak.run_client, args=(number,))
            for number in range(args.clients)
        ]
        for client in clients:
            client.start()
        num_kills, memory = 0, list[int]()
        began = last_kill = time.monotonic()
        while time.monotonic() - began < args.seconds:
            time.sleep(1)
            memory.append(resident_bytes(pid))
            is_time = time.monotonic() - last_kill >= args.kill_every
            if is_time and num_up(url) == 2:  # the last one's death would be the fleet's
                os.kill(rng.choice(engines_of(pid)), signal.SIGKILL)
                last_kill = time.monotonic()
                num_kills += 1
        soak.is_over.set()
        for client in clients:
            client.join(REQUEST_SECONDS)
    told = account(soak, memory, num_kills, time.monotonic() - began)
    print(json.dumps(told))
    return 0 if told["ok"] else 1


def account(soak: Soak, memory: list[int], num_kills: int, seconds: float) -> dict[str, Any]:
    """Returns what there is to say, `ok` among it."""
    quarter = max(len(memory) // 4, 1)
    # The very first seconds fill what is kept for good.
    first = statistics.median(memory[quarter // 2 : quarter + quarter // 2] or memory)
    last = statistics.median(memory[-quarter:])
    problems = dict(soak.problems)
    if sum(soak.ends.values()) != soak.num_asked:
        problems["requests without an end"] = soak.num_asked - sum(soak.ends.values())
    if last > first * (1 + MAX_GROWTH):
        problems["bytes that the front grew by"] = int(last - first)
    return {
        "ok": not problems and num_kills > 0,
        "problems": problems,
        "seconds": round(seconds),
        "kills": num_kills,
        "requests": soak.num_asked,
        "ends": dict(soak.ends),
        "front_mib": [round(first / 2**20), round(last / 2**20)],
    }


if __name__ == "__main__":
    sys.exit(main())
