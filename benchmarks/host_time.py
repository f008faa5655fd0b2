"""Host time of each station of a step, as JSON: what stands between a request and its first kernel,
and what a token costs once all decode.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --model qwen1.5-moe-a2.7b --layers 12 --repeats 30
    python benchmarks/host_time.py --cases decodes load

One line for each case. `first` cases: microseconds of all steps up to the last first token, and of
the decode after them, least and median. `decodes` (64, 256 and 1,024 rows) and the `load` (four
waves of 1,024 requests of 32 + 64 tokens, with all their starts and ends): microseconds a step and
a token. With a GPU all is real, on random weights. Without one the runner of a GPU runs on the host
with Triton's launches left out: everything but the kernels is still there, and what is told is the
thread's own CPU time, since nothing waits.

    add         requests into the queues      launch      all of the runner's launch, of which
    schedule    the plan of the step            rows        rows, copies, tables
    collect     results, without the wait       inputs      arrays of the step
    commit      tokens, finished blocks         attention   the back end's plan
    deliver     the message to the front        forward     uploads and launches, or a replay
                                                sample      uploads and launches
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.ipc import Deltas, encode
from octavo.grammar import Guides
from octavo.kv_cache.planner import MemoryPlan
from octavo.request import Request, pack_ids

MAX_MODEL_LEN, MAX_BATCHED_TOKENS, MAX_SEQS, VOCAB_SIZE = 16_384, 8192, 1024, 9000
NUM_BLOCKS, NUM_OUTPUTS = 32_768, 4


class Case(NamedTuple):
    name: str
    requests: int
    prefix: int
    """Tokens that all have in common, cached before."""
    prompt: int
    """Tokens beyond these."""


CASES = (
    Case("a prompt of 8192", 1, 0, 8192),
    Case("64 prompts of 100", 64, 0, 100),
    Case("64 on a prefix of 4096", 64, 4096, 64),
)


DECODE_ROWS = (64, 256, 1024)
DECODE_STEPS = 96
LOAD_REQUESTS, LOAD_PROMPT, LOAD_OUTPUT = 4 * MAX_SEQS, 32, 64


class Stations:
    """Times calls of methods by wrapping them; what a station calls of another is part of both."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, station: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any, **named: Any) -> Any:
            began = self.clock()
            try:
                return inner(*given, **named)
            finally:
                self.seconds[station] += self.clock() - began

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Returns the seconds since it was last asked."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of each station of a step")
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a shape of octavo bench")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    kinds = ("first", "decodes", "load")
    parser.add_argument("--cases", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    core = real_core(options) if has_gpu else stubbed_core(options)
    stations = watched(core, time.perf_counter if has_gpu else time.thread_time)
    settings = {"model": options.model, "layers": options.layers, "gpu": has_gpu}

    def tell(case: str, figures: dict[str, Any]) -> None:
        print(json.dumps({"case": case, **settings, **figures}), flush=True)

    if "first" in options.cases:
        for case in CASES:
            tell(case.name, measure(core, stations, case, options.repeats))
    if "decodes" in options.cases:
        for rows in DECODE_ROWS:
            tell(f"{rows} decodes", measure_decodes(core, stations, rows))
    if "load" in options.cases:
        name = f"{LOAD_REQUESTS} requests of {LOAD_PROMPT} + {LOAD_OUTPUT}, {MAX_SEQS} rows"
        tell(name, measure_load(core, stations))
    core.close()


def real_core(options: argparse.Namespace) -> EngineCore:
    from octavo.cli.bench.shapes import engine_values

    folder = Path(tempfile.mkdtemp())
    values = engine_values(options.model, {}, folder, options.layers)
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_BATCHED_TOKENS}
    core = LLM(**{**values, **sizes, "max_num_seqs": MAX_SEQS})._core
    assert isinstance(core, EngineCore), "one engine is measured, not a fleet"
    return core


def stubbed_core(options: argparse.Namespace) -> EngineCore:
    """Returns an engine whose runner is a GPU's, on the host, and whose kernels are left out."""
    from tests.runner import binaries

    log = binaries.Log()
    changed: dict[str, Any] = {
        "print": lambda *anything: None,
        "SMALLER": {"num_hidden_layers": options.layers, "vocab_size": VOCAB_SIZE},
        "MAX_LEN": MAX_MODEL_LEN,
        "MAX_TOKENS": MAX_BATCHED_TOKENS,
        "MAX_SEQS": MAX_SEQS,
        "NUM_BLOCKS": NUM_BLOCKS,
    }
    for name, value in changed.items():
        setattr(binaries, name, value)
    binaries.pretend(log)
    runner, _ = binaries.make_runner(options.model)
    plan = MemoryPlan(
        available_bytes=0,
        usable_bytes=0,
        weights_bytes=0,
        activation_bytes=0,
        groups=runner.storage.groups,
        block_size=runner.storage.block_size,
        num_chunks=runner.storage.num_chunks,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_position_embeddings=MAX_MODEL_LEN,
        max_num_seqs=MAX_SEQS,
    )
    config = EngineConfig(model="none", max_num_seqs=MAX_SEQS, step_stretch=0.0).resolve()
    return EngineCore(config, plan, runner, "none", Guides(no_vocabulary, VOCAB_SIZE))


def no_vocabulary() -> Any:
    raise AssertionError("nobody asks for a grammar")


def watched(core: EngineCore, clock: Callable[[], float]) -> Stations:
    stations = Stations(clock)
    runner: Any = core._runner
    stations.watch(core, "add", "add")
    stations.watch(core.scheduler, "schedule", "schedule")
    stations.watch(core.scheduler, "commit", "commit")
    stations.watch(runner, "launch", "launch")
    stations.watch(runner, "_update_rows", "rows")
    stations.watch(runner._batch, "prepare", "inputs")
    stations.watch(runner._planner, "plan", "attention")
    stations.watch(runner._forward, "run", "forward")
    stations.watch(runner._sampler, "sample", "sample")
    collect = runner.collect

    def waiting_first(ticket: object) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that what is timed is the host's part alone
        began = stations.clock()
        result = collect(ticket)
        stations.seconds["collect"] += stations.clock() - began
        return result

    runner.collect = waiting_first
    if not torch.cuda.is_available():
        sample = runner._sampler.sample

        def sampling_something(*given: Any, **named: Any) -> Any:
            sampled = sample(*given, **named)
            sampled.token_ids.zero_()  # what no kernel wrote would end sequences, or not
            return sampled

        runner._sampler.sample = sampling_something
    return stations


def measure(core: EngineCore, stations: Stations, case: Case, repeats: int) -> dict[str, Any]:
    draw = random.Random(case.name)
    tokens = lambda count: [draw.randrange(VOCAB_SIZE) for _ in range(count)]
    prefix = tokens(case.prefix)
    if prefix:
        run(core, stations, [prefix])
    firsts: list[dict[str, float]] = []
    decodes: list[dict[str, float]] = []
    for repeat in range(repeats + 3):
        prompts = [prefix + tokens(case.prompt) for _ in range(case.requests)]
        first, decode = run(core, stations, prompts)
        if repeat >= 3:  # what is built or allocated once is not asked here
            firsts.append(first)
            decodes.append(decode)
    return {"first_step": summary(firsts), "decode": summary(decodes)}


def run(
    core: EngineCore, stations: Stations, prompts: list[list[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the seconds of what leads to the first tokens of all, and of the step after it."""
    params = SamplingParams(temperature=1.0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    stations.take()
    for index, prompt in enumerate(prompts):
        request = Request(request_id=str(index), packed_prompt=pack_ids(prompt), params=params)
        core.add(request)
    waiting = {str(index) for index in range(len(prompts))}
    steps: list[dict[str, float]] = []
    first: dict[str, float] | None = None
    while core.has_work:
        waiting -= {delta.request_id for delta in core.step() if delta.token_ids}
        if first is None and not waiting:
            first = stations.take()
        elif first is not None:
            steps.append(stations.take())
    assert first is not None
    return first, steps[0]


def add_requests(core: EngineCore, count: int, prompt: int, output: int) -> None:
    draw = random.Random(count)
    params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
    for index in range(count):
        ids = pack_ids([draw.randrange(VOCAB_SIZE) for _ in range(prompt)])
        core.add(Request(request_id=f"0-{index}", packed_prompt=ids, params=params))


def step(core: EngineCore, stations: Stations) -> int:
    """Runs a step and words its news; returns the tokens that it told."""
    deltas = core.step()
    began = stations.clock()
    encode(Deltas(deltas))
    stations.seconds["deliver"] += stations.clock() - began
    return sum(len(delta.token_ids) for delta in deltas)


def measure_decodes(core: EngineCore, stations: Stations, rows: int) -> dict[str, Any]:
    """Returns what a step of so many decodes costs, blocks that begin and end included."""
    output = DECODE_STEPS + 4 * LOAD_PROMPT * rows // MAX_BATCHED_TOKENS + 8
    add_requests(core, rows, LOAD_PROMPT, output)
    num_told = 0
    while num_told < rows or core.scheduler.num_waiting:
        num_told = step(core, stations)
    stations.take()
    num_tokens = sum(step(core, stations) for _ in range(DECODE_STEPS))
    found = stations.take()
    while core.has_work:
        core.step()
    return by_step_and_token(found, DECODE_STEPS, num_tokens)


def measure_load(core: EngineCore, stations: Stations) -> dict[str, Any]:
    """Returns what a token of many short requests costs, with all that begins and ends."""
    stations.take()
    add_requests(core, LOAD_REQUESTS, LOAD_PROMPT, LOAD_OUTPUT)
    num_steps = num_tokens = 0
    while core.has_work:
        num_tokens += step(core, stations)
        num_steps += 1
    return by_step_and_token(stations.take(), num_steps, num_tokens)


def by_step_and_token(
    found: dict[str, float], num_steps: int, num_tokens: int
) -> dict[str, dict[str, float]]:
    """Returns microseconds by station; `engine` is all but the runner's launch."""
    engine = ("add", "schedule", "collect", "commit", "deliver")
    found["engine"] = sum(found.get(name, 0.0) for name in engine)
    names = sorted(found)
    return {
        "us_a_step": {name: round(1e6 * found[name] / num_steps, 1) for name in names},
        "us_a_token": {name: round(1e6 * found[name] / num_tokens, 3) for name in names},
    }


def summary(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Returns [least, median] microseconds by station."""
    names = sorted({name for one in runs for name in one})
    columns = {name: [1e6 * one.get(name, 0.0) for one in runs] for name in names}
    return {
        name: [round(min(column), 1), round(statistics.median(column), 1)]
        for name, column in columns.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
