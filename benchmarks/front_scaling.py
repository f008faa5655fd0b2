"""What front processes carry: tokens/s through HTTP over an engine that computes nothing.

    python benchmarks/front_scaling.py MODEL [--fronts 1,2,4] [--cases 1024x32+64] [engine options]

The engine process is `synthetic_engine.py`. One JSON line for each number of front processes, and
their CPU time a token. Wants two cores for each front process, for itself and for its clients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from process_figures import children_of, cpu_seconds

ROOT = Path(__file__).resolve().parents[1]
SERVE = (
    "import sys; import octavo.engine.child as child; "
    "child.ENGINE_MODULE = 'benchmarks.synthetic_engine'; "
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


def measured(url: str, case: tuple[int, int, int], clients: int, vocab_size: int) -> dict:
    """Returns the figures of one run of `octavo bench serve`."""
    streams, input_len, output_len = case
    command = f"bench serve --url {url} --clients {clients} --concurrency {streams} --waves 8"
    lengths = f"--input-len {input_len} --output-len {output_len} --vocab-size {vocab_size}"
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *command.split(), *lengths.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def fronts_of(parent: int) -> list[Path]:
    """Returns where the front processes of a server tell their CPU time."""
    folders = [Path(f"/proc/{pid}") for pid in children_of(parent)]
    return [
        folder / "stat"
        for folder in folders
        if b"octavo.server.front_process" in (folder / "cmdline").read_bytes()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--fronts", default="1,2,4")
    parser.add_argument("--case", default="1024x32+64")
    parser.add_argument("--vocab-size", type=int, default=8192)
    args, options = parser.parse_known_args()
    streams, input_len, output_len = map(int, re.split(r"[x+]", args.case))
    rate_of_one = 0.0
    for fronts in map(int, args.fronts.split(",")):
        with served(args.model, fronts, streams, options) as (url, parent):
            clients = max(4, 2 * fronts)
            measured(url, (streams, input_len, output_len), clients, args.vocab_size)
            stats = fronts_of(parent) if fronts > 1 else [Path(f"/proc/{parent}/stat")]
            before = [cpu_seconds(stat) for stat in stats]
            result = measured(url, (streams, input_len, output_len), clients, args.vocab_size)
            used = sum(map(cpu_seconds, stats)) - sum(before)
        found = result["figures"]
        rate = found["output_tokens_per_second"]
        rate_of_one = rate_of_one or rate / fronts
        num_tokens = streams * 8 * output_len
        line = {
            "case": args.case,
            "api_processes": fronts,
            "output_tokens_per_second": round(rate, 1),
            "over_linear": round(rate / (rate_of_one * fronts), 3),
            "front_us_a_token": round(1e6 * used / num_tokens, 1),
            "itl_p50_ms": found.get("itl_p50_ms"),
            "itl_p99_ms": found.get("itl_p99_ms"),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
