"""The server beside the engine it serves: rates, time between tokens, CPU and memory of the front.

    python benchmarks/serving_suite.py MODEL [--cases 64x512+128,...] [engine options]
    python benchmarks/serving_suite.py OLMOE --load-format dummy --output results.jsonl

Each case is STREAMSxINPUT+OUTPUT. First offline, in a process of its own: `LLM.generate` with
--max-num-seqs STREAMS and WAVES x STREAMS requests. Then the same lists of requests through
`octavo serve`, a stream's next request coming when its answer ends, sent by `octavo bench serve`.
Both run the load once before it counts, so that kernels are built; prompts are new in every run.
One JSON line a case, and a table at the end. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from process_figures import PeakMemory, children_of, cpu_seconds, cpu_times

from octavo.cli.bench.report import Report
from octavo.cli.bench.workload import Lengths, PromptSource, positive
from octavo.cli.commands import build_parser
from octavo.cli.options import config_values, say
from octavo.config import EngineConfig

READY_SECONDS = 240.0
RUN_OCTAVO = "import sys; from octavo.cli import main; sys.exit(main())"
SAMPLER = Path(__file__).with_name("front_sampler.py")
KEPT = (
    "output_tokens_per_second",
    "output_tokens",
    "output_events",
    "itl_p50_ms",
    "itl_p99_ms",
    "itl_p99_over_p50",
    "ttft_after_first_wave_p50_ms",
    "ttft_after_first_wave_p99_ms",
    "ttft_after_first_wave_p99_over_p50",
    "client_cpu_share",
)
TABLE = (
    ("offline tok/s", "offline_tokens_per_second"),
    ("server tok/s", "output_tokens_per_second"),
    ("ratio", "over_offline"),
    ("itl p50 ms", "itl_p50_ms"),
    ("p99 ms", "itl_p99_ms"),
    ("p99/p50", "itl_p99_over_p50"),
    ("ttft p50 ms", "ttft_after_first_wave_p50_ms"),
    ("p99/p50", "ttft_after_first_wave_p99_over_p50"),
    ("front us/tok", "front_us_a_token"),
    ("engine us/tok", "engine_us_a_token"),
    ("KiB/conn", "front_kib_a_connection"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load: `streams` closed loops of requests, all equally long."""

    streams: int
    input: int
    output: int

    def __str__(self) -> str:
        return f"{self.streams}x{self.input}+{self.output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all cases have in common."""

    model: str
    options: Sequence[str]
    """Engine options, as both faces read them."""
    waves: int
    repeat: int
    clients: int
    temperature: float
    vocab_size: int
    seed: int
    profile: bool


def parse_case(text: str) -> Case:
    """Returns a Case from "64x512+128"."""
    match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no case; write it like 64x512+128")
    return Case(streams=int(match[1]), input=int(match[2]), output=int(match[3]))


def parse_cases(text: str) -> list[Case]:
    return [parse_case(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    cases = "64x512+128,256x512+128,1024x32+64"
    parser.add_argument("--cases", type=parse_cases, default=parse_cases(cases), help=cases)
    parser.add_argument("--waves", type=positive, default=4, help="requests a stream")
    parser.add_argument("--repeat", type=positive, default=2, help="runs; the median counts")
    parser.add_argument("--clients", type=positive, default=4, help="client processes")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--vocab-size", type=positive, default=8192, help="ids drawn for prompts")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFF)
    parser.add_argument("--profile", action="store_true", help="also sample the front of each case")
    parser.add_argument("--no-offline", action="store_true")
    parser.add_argument("--output", help="append JSON lines here, not to stdout")
    args, options = parser.parse_known_args()
    job = Job(
        options=options,
        **{n: v for n, v in vars(args).items() if n in Job.__dataclass_fields__},
    )
    settings = {n: v for n, v in vars(args).items() if n not in ("output", "cases")}
    settings |= {"options": " ".join(options)}
    report = Report(bench="serving_suite", settings=settings, output=args.output)
    rows = []
    for case in args.cases:
        figures = measure_offline(job, case) if not args.no_offline else {}
        figures |= measure_server(job, case)
        if not args.no_offline:
            figures["over_offline"] = (
                figures["output_tokens_per_second"] / figures["offline_tokens_per_second"]
            )
        report.add(str(case), figures)
        rows.append((case, figures))
    print_table(rows)
    return 0


def requests_of(job: Job, case: Case, run: int) -> list[list[int]]:
    """Returns the prompts of one run, as `octavo bench serve` draws them from the same seed."""
    source = PromptSource(vocab_size=job.vocab_size, seed=job.seed + run)
    lengths = Lengths(low=case.input, high=case.input)
    return [source.draw(1, lengths, index)[0] for index in range(case.streams * job.waves)]


# -- offline -------------------------------------------------------------------------------------


def measure_offline(job: Job, case: Case) -> dict[str, Any]:
    """Runs in a process of its own, whose memory is free for the server afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_offline, args=(theirs, job, case))
    process.start()
    theirs.close()
    try:
        figures = ours.recv()
    except EOFError:
        raise SystemExit(f"the offline run of {case} ended early; see above") from None
    process.join()
    return figures


def run_offline(pipe: Connection, job: Job, case: Case) -> None:
    from octavo import LLM, SamplingParams

    parsed = build_parser().parse_args(["serve", job.model, *job.options])
    options = {**config_values(parsed, EngineConfig), "max_num_seqs": case.streams}
    began = time.perf_counter()
    llm = LLM(job.model, **options)
    loaded = time.perf_counter() - began
    params = SamplingParams(
        temperature=job.temperature, max_tokens=case.output, ignore_eos=True, seed=None
    )
    seconds, steps = [], []
    for run in range(1 + job.repeat):
        prompts = requests_of(job, case, run)
        before, began = llm.stats().num_steps, time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        steps.append(llm.stats().num_steps - before)
        num_tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
        assert num_tokens == len(prompts) * case.output, "an answer was cut short"
    rates = [len(prompts) * case.output / one for one in seconds[1:]]
    pipe.send(
        {
            "offline_tokens_per_second": median(rates),
            "offline_runs": rates,
            "offline_steps": steps[-1],
            "offline_load_seconds": loaded,
        }
    )
    llm.close()


# -- through the server ----------------------------------------------------------------------------


def measure_server(job: Job, case: Case) -> dict[str, Any]:
    """Starts a server, warms it up (which tells the memory of its connections), and measures."""
    figures: dict[str, Any] = {}
    with started(job, case, None) as server:
        send(job, Case(streams=1, input=case.input, output=2), server, run=-1)
        with PeakMemory(server.pid) as memory:
            send(job, case, server, run=0)
        figures["front_kib_a_connection"] = memory.growth / case.streams / 1024
        figures["front_rss_bytes"] = memory.before
        runs = [measured(job, case, server, run) for run in range(1, 1 + job.repeat)]
    for name in runs[0]:
        figures[name] = median([run[name] for run in runs])
    figures["server_runs"] = [run["output_tokens_per_second"] for run in runs]
    figures["itl_ratios"] = [run["itl_p99_over_p50"] for run in runs]
    if job.profile:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            with started(job, case, report) as server:
                send(job, case, server, run=0)
                os.kill(server.pid, signal.SIGUSR2)
                send(job, case, server, run=1)
                os.kill(server.pid, signal.SIGUSR2)
                print_profile(case, wait_for_json(report))
    return figures


def measured(job: Job, case: Case, server: Server, run: int) -> dict[str, Any]:
    before, steps = server.cpu(), server.num_steps()
    figures = send(job, case, server, run)
    after = server.cpu()
    num_tokens = figures["output_tokens"]
    assert num_tokens == case.streams * job.waves * case.output, "an answer was cut short"
    spent = {name: after[name] - before[name] for name in after}
    return {name: figures[name] for name in KEPT if name in figures} | {
        "steps": server.num_steps() - steps,
        "front_us_a_token": 1e6 * spent["front"] / num_tokens,
        "front_system_us_a_token": 1e6 * spent["front_system"] / num_tokens,
        "events_a_token": figures["output_events"] / num_tokens,
        "front_main_thread_us_a_token": 1e6 * spent["front_main"] / num_tokens,
        "front_busy_share": spent["front_main"] / figures["seconds"],
        "engine_us_a_token": 1e6 * spent["engine"] / num_tokens,
        "engine_main_busy_share": spent["engine_main"] / figures["seconds"],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server, and what /proc tells of its processes."""

    url: str
    pid: int

    def cpu(self) -> dict[str, float]:
        """Returns CPU seconds so far, of whole processes and of their main threads."""
        engine = children_of(self.pid)
        return {
            "front": cpu_seconds(Path(f"/proc/{self.pid}/stat")),
            "front_system": cpu_times(self.pid)[1],
            "front_main": cpu_seconds(Path(f"/proc/{self.pid}/task/{self.pid}/stat")),
            "engine": sum(cpu_seconds(Path(f"/proc/{pid}/stat")) for pid in engine),
            "engine_main": sum(cpu_seconds(Path(f"/proc/{p}/task/{p}/stat")) for p in engine),
        }

    def num_steps(self) -> int:
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.search(r"^octavo:steps_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)
        assert found is not None, "/metrics has no octavo:steps_total"
        return int(float(found[1]))


@contextlib.contextmanager
def started(job: Job, case: Case, sampled: Path | None) -> Iterator[Server]:
    """A server for one case; with `sampled` its front is sampled, and the report goes there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ["-c", RUN_OCTAVO] if sampled is None else [str(SAMPLER), str(sampled)]
    command = [sys.executable, *program, "serve", job.model, "--port", str(port)]
    command += ["--max-num-seqs", str(case.streams), *job.options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            if not wait_until_ready(url, process):
                log.seek(0)
                raise SystemExit(f"the server did not start:\n{log.read().decode()[-4000:]}")
            yield Server(url=url, pid=process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/ready", timeout=5):
            return True
        time.sleep(0.2)
    return False


def send(job: Job, case: Case, server: Server, run: int) -> dict[str, Any]:
    """Runs `octavo bench serve` and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.jsonl"
        command = [sys.executable, "-c", RUN_OCTAVO, "bench", "serve", "--url", server.url]
        settings = {
            "concurrency": case.streams,
            "waves": job.waves,
            "clients": min(job.clients, case.streams),
            "input-len": case.input,
            "output-len": case.output,
            "temperature": job.temperature,
            "vocab-size": job.vocab_size,
            "workload-seed": job.seed + run,
            "output": output,
        }
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench serve failed:\n{done.stdout}{done.stderr}"[-4000:])
        return json.loads(output.read_text())["figures"]


# -- output --------------------------------------------------------------------------------------


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def wait_for_json(path: Path) -> dict[str, Any]:
    for _ in range(100):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        time.sleep(0.1)
    raise SystemExit("the sampled front wrote no report")


def print_profile(case: Case, report: dict[str, Any]) -> None:
    say(f"\nfront of {case}: {report.pop('num_samples')} samples of its main thread")
    for title, shares in report.items():
        say(f"  {title}")
        for name, share in shares.items():
            say(f"    {share:6.1%}  {name}")


def print_table(rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    say("\n" + "".join(f"{title:>14}" for title in ("case", *(title for title, _ in TABLE))))
    for case, figures in rows:
        cells = [f"{figures.get(name, float('nan')):,.2f}" for _, name in TABLE]
        say("".join(f"{cell:>14}" for cell in (str(case), *cells)))


if __name__ == "__main__":
    sys.exit(main())
