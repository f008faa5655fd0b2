"""What front processes carry: tokens/s through HTTP over an engine that computes nothing.

    python benchmarks/front_scaling.py MODEL [--fronts 1,2,4] [--cases 1024x32+64] [engine options]

The engine process is `synthetic_engine.py`. One JSON line for each case and number of front
processes, with their CPU time a token, and what a request and a token cost apart: each case runs
with an eighth of its answers' length, too. For rates it wants two cores for each front process, for
itself and for its clients; for CPU time alone, a --step-ms that leaves the front idle now and then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from process_figures import children_of, cpu_times

ROOT = Path(__file__).resolve().parents[1]
SERVE = (
    "import sys; import octavo.engine.spawn as spawn; "
    "spawn.ENGINE_MODULE = 'benchmarks.synthetic_engine'; "
    "from octavo.cli import main; sys.exit(main())"
)
BENCH = "import sys; from octavo.cli import main; sys.exit(main())"


@contextlib.contextmanager
def served(model: str, fronts: int, streams: int, options: list[str]) -> Iterator[tuple[str, int]]:
    """A server with so many front processes; the value is its URL and its process id."""
    with tempfile.NamedTemporaryFile("r") as log:
        arguments = ["serve", model, "--port=0", f"--max-num-seqs={streams}", "--log-level=warning"]
        command = [sys.executable, "-c", SERVE, *arguments, f"--api-processes={fronts}", *options]
        process = subprocess.Popen(command, cwd=ROOT, stderr=open(log.name, "w"))  # noqa: SIM115
        try:
            deadline = time.monotonic() + 240
            while not (found := re.search(r"is served on (\S+)", Path(log.name).read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.2)
            yield found[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def measured(
    url: str, case: tuple[int, int, int], clients: int, waves: int, vocab_size: int
) -> dict:
    """Returns the figures of one run of `octavo bench serve`."""
    streams, input_len, output_len = case
    command = f"bench serve --url {url} --clients {clients} --concurrency {streams}"
    lengths = f"--input-len {input_len} --output-len {output_len} --vocab-size {vocab_size}"
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *command.split(), f"--waves={waves}", *lengths.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def fronts_of(parent: int) -> list[int]:
    """Returns the front processes of a server."""
    return [
        pid
        for pid in children_of(parent)
        if b"octavo.server.front_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU time of the fronts over a run."""

    user: float
    system: float
    num_tokens: int
    num_requests: int
    figures: dict

    @property
    def seconds(self) -> float:
        return self.user + self.system


def spent(url: str, case: tuple[int, int, int], args: argparse.Namespace, pids: list[int]) -> Spent:
    """Runs a case and returns what it took."""
    before = [cpu_times(pid) for pid in pids]
    clients = args.clients or max(4, 2 * len(pids))
    figures = measured(url, case, clients, args.waves, args.vocab_size)["figures"]
    after = [cpu_times(pid) for pid in pids]
    user, system = (
        sum(one[kind] for one in after) - sum(one[kind] for one in before) for kind in (0, 1)
    )
    num_requests = case[0] * args.waves
    return Spent(user, system, num_requests * case[2], num_requests, figures)


def costs(long: Spent, short: Spent) -> tuple[float, float]:
    """Returns what a request and a token cost, microseconds, of two runs whose answers differ in
    their length alone."""
    token = (long.seconds / long.num_requests - short.seconds / short.num_requests) / (
        long.num_tokens / long.num_requests - short.num_tokens / short.num_requests
    )
    request = short.seconds / short.num_requests - token * short.num_tokens / short.num_requests
    return 1e6 * request, 1e6 * token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--fronts", default="1,2,4")
    parser.add_argument("--cases", default="1024x32+64")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--waves", type=int, default=8)
    parser.add_argument("--clients", type=int, help="4, or two for each front if not given")
    parser.add_argument("--step-ms", type=float, default=4, help="of the engine, at least")
    args, options = parser.parse_known_args()
    os.environ["STEP_MS"] = str(args.step_ms)
    cases = [tuple(map(int, re.split(r"[x+]", case))) for case in args.cases.split(",")]
    rates: dict[str, float] = {}
    for fronts in map(int, args.fronts.split(",")):
        streams = max(case[0] for case in cases)
        with served(args.model, fronts, streams, options) as (url, parent):
            pids = fronts_of(parent) if fronts > 1 else [parent]
            spent(url, cases[0], args, pids)
            for streams, input_len, output_len in cases:
                name = f"{streams}x{input_len}+{output_len}"
                short = spent(url, (streams, input_len, max(2, output_len // 8)), args, pids)
                long = spent(url, (streams, input_len, output_len), args, pids)
                rate = long.figures["output_tokens_per_second"]
                of_one = rates.setdefault(name, rate / fronts)
                request, token = costs(long, short)
                line = {
                    "case": name,
                    "api_processes": fronts,
                    "output_tokens_per_second": round(rate, 1),
                    "over_linear": round(rate / (of_one * fronts), 3),
                    "front_us_a_token": round(1e6 * long.seconds / long.num_tokens, 1),
                    "of_these_system": round(1e6 * long.system / long.num_tokens, 1),
                    "us_a_request": round(request),
                    "us_a_token_alone": round(token, 1),
                    "events_a_token": round(long.figures["output_events"] / long.num_tokens, 3),
                    "itl_p50_ms": long.figures.get("itl_p50_ms"),
                    "itl_p99_ms": long.figures.get("itl_p99_ms"),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
