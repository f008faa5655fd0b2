"""A wave of requests: when the engine has all of them, and in how many messages.

    python benchmarks/front_wave.py MODEL [--requests 1024] [--input-len 32] [--waves 8]

The engine process is `synthetic_engine.py`, which notes when requests come. All connections are
open before a wave; all bodies are sent at once. One JSON line, of medians over the waves but the
first. Besides the time there is the CPU time that the front has spent from the first request's
arrival in the engine to the last one's: on a busy machine that alone says something.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from front_scaling import served
from process_figures import cpu_times


def requests_of(count: int, input_len: int, output_len: int, host: str) -> list[bytes]:
    """Returns what a wave sends, each on a connection of its own."""
    draw, found = random.Random(0), []
    for _ in range(count):
        ids = [draw.randrange(300, 8000) for _ in range(input_len)]
        body = {"prompt": ids, "max_tokens": output_len, "ignore_eos": True, "stream": True}
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        )
        found.append(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def read_all(connections: list[socket.socket]) -> None:
    """Reads every answer to its end."""
    for connection in connections:
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data = data[-8:] + connection.recv(65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=17)
    parser.add_argument("--waves", type=int, default=8)
    args, options = parser.parse_known_args()
    os.environ["STEP_MS"] = str(args.step_ms)
    with tempfile.NamedTemporaryFile("r") as log:
        os.environ["ARRIVALS"] = log.name
        with served(args.model, 1, args.requests, options) as (url, pid):
            address = urlsplit(url)
            where = (address.hostname or "", address.port or 0)
            sent = requests_of(args.requests, args.input_len, args.output_len, address.netloc)
            connections = [socket.create_connection(where) for _ in sent]
            began, spent = [], []
            for _ in range(args.waves):
                before = sum(cpu_times(pid))
                began.append(time.monotonic())
                for connection, data in zip(connections, sent, strict=True):
                    connection.sendall(data)
                read_all(connections)
                spent.append(sum(cpu_times(pid)) - before)
                time.sleep(0.2)
        arrivals = [json.loads(line) for line in Path(log.name).read_text().splitlines()]
    # The engine may have been without work within a wave.
    ends = [*began[1:], float("inf")]
    waves = [
        [one for one in arrivals if start <= one["first"] < end]
        for start, end in zip(began, ends, strict=True)
    ][1:]
    times = zip(began[1:], waves, strict=True)
    figures = {
        "all_ms": [1e3 * (one[-1]["last"] - start) for start, one in times],
        "front_cpu_ms": [1e3 * (one[-1]["last_cpu"] - one[0]["first_cpu"]) for one in waves],
        "messages": [sum(part["messages"] for part in one) for one in waves],
        "front_us_a_request": [1e6 * seconds / args.requests for seconds in spent[1:]],
    }
    told = {name: round(statistics.median(values), 1) for name, values in figures.items()}
    print(json.dumps({"requests": args.requests} | told))


if __name__ == "__main__":
    main()
