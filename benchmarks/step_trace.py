"""Traces steps of an engine on this GPU: which kernels they launch, in order, and what each adds.

    python benchmarks/step_trace.py deepseek-v2-lite [--cases D1,D32,Ha,D256,Hb,T] [--layers N]
        [--quantization q4_k_m]

Shapes, requests and warm-up are those of `octavo bench workloads`; weights are random. Kernels of a
step overlap, and wait for each other while they do: what one adds is the time from the end of all
before it to its own. A layer's row is the mean over layers and steps. "idle" is what no kernel ran.
T is run once without the profiler: how long its steps take, by how many rows and tokens they have.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from octavo.cli.bench.device_profile import LEAD_TOKENS, Activity
from octavo.cli.bench.offline import measure
from octavo.cli.bench.shapes import FULL, engine_values, fixed_prompts, mixed_requests
from octavo.folders import temporary_folder
from octavo.llm import LLM
from octavo.request import Request, SamplingParams, pack_ids
from octavo.step import StepPlan, StepResult

PROFILED_STEPS, TIMED_STEPS = 6, 24
NAME = 44
PREFIX, TAIL = FULL.prefix, FULL.shared.prompt


def activities(run: Callable[[], object]) -> list[Activity]:
    """Returns what the device did while `run` ran, by its start."""
    kind = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found = [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == kind
    ]
    return sorted(found, key=lambda activity: activity.start)


def short(name: str) -> str:
    return name.split("<")[0].removeprefix("void ")[:NAME]


def added(found: Sequence[Activity]) -> list[tuple[str, float, float, float]]:
    """Returns (name, us from the end of those before to its own, us it ran, us nothing ran)."""
    rows: list[tuple[str, float, float, float]] = []
    reached = found[0].start
    for name, start, end in found:
        idle = max(start - reached, 0.0)
        rows.append((short(name), max(end - reached, 0.0), end - start, idle))
        reached = max(reached, end)
    return rows


def print_sums(title: str, found: Sequence[Activity], steps: int, wall_ms: float) -> None:
    """Prints what each kernel added to a step, most first."""
    if not found:
        print(f"{title}: nothing was recorded", flush=True)
        return
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    idle = 0.0
    for name, more, ran, nothing in added(found):
        sums[name][0] += 1
        sums[name][1] += more
        sums[name][2] += ran
        idle += nothing
    span = max(one.end for one in found) - found[0].start
    print(
        f"\n{title}: {wall_ms:.3f} ms a step; profiled {span / 1e3 / steps:.3f},"
        f" idle {idle / 1e3 / steps:.3f} of it"
    )
    print(f"  {'kernel':{NAME}} {'calls':>6} {'adds us':>9} {'ran us':>9} {'us each':>8}")
    for name, (count, more, ran) in sorted(sums.items(), key=lambda item: -item[1][1])[:26]:
        print(
            f"  {name:{NAME}} {count / steps:6.1f} {more / steps:9.1f} {ran / steps:9.1f}"
            f" {more / count:8.2f}"
        )


def print_layer(found: Sequence[Activity], marks: Sequence[str]) -> None:
    """Prints the kernels of the commonest kind of layer in order; a layer begins with a mark."""
    rows = added(found)
    starts = [at for at, row in enumerate(rows) if any(mark in row[0] for mark in marks)]
    layers: defaultdict[tuple[str, ...], list[list[tuple[str, float, float, float]]]] = defaultdict(
        list
    )
    for begin, end in pairwise(starts):
        layers[tuple(row[0] for row in rows[begin:end])].append(rows[begin:end])
    if not layers:
        return
    same = max(layers.values(), key=len)
    total = sum(row[1] for layer in same for row in layer) / len(same)
    print(f"  a layer ({len(same)} of {max(len(starts) - 1, 1)}): {total:.2f} us")
    for at, row in enumerate(same[0]):
        more = sum(layer[at][1] for layer in same) / len(same)
        ran = sum(layer[at][2] for layer in same) / len(same)
        print(f"    {row[0]:{NAME}} adds {more:8.2f}  ran {ran:8.2f}")


class Tracer:
    def __init__(self, llm: LLM, marks: Sequence[str]) -> None:
        self._llm, self._core, self._marks = llm, llm.core, marks

    def decode(self, title: str, prompts: list[list[int]]) -> None:
        """Traces steps in which all prompts decode."""
        core = self._core
        params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True, detokenize=False)
        made = {f"trace-{index}": 0 for index in range(len(prompts))}
        for name, ids in zip(made, prompts, strict=True):
            core.add(Request(request_id=name, packed_prompt=pack_ids(ids), params=params))

        def steps(count: int) -> None:
            for _ in range(count):
                core.step()

        while min(made.values()) < LEAD_TOKENS:
            for delta in core.step():
                made[delta.request_id] += len(delta.token_ids)
        began = time.perf_counter()
        steps(TIMED_STEPS)
        wall = (time.perf_counter() - began) / TIMED_STEPS
        found = activities(lambda: steps(PROFILED_STEPS))
        for name in made:
            core.abort(name)
        while core.has_work:
            core.step()
        self._print(title, found, PROFILED_STEPS, wall)

    def prompts(self, title: str, make: Callable[[int], list[list[int]]]) -> None:
        """Traces the steps of new prompts, one token each."""
        batches = [make(number) for number in range(5)]
        walls = [measure(self._llm, batch, [1] * len(batch)).seconds for batch in batches]
        fresh = make(9)
        found = activities(lambda: measure(self._llm, fresh, [1] * len(fresh)))
        self._print(title, found, 1, median(walls))

    def _print(self, title: str, found: list[Activity], steps: int, wall: float) -> None:
        print_sums(title, found, steps, 1e3 * wall)
        if found:
            print_layer(found, self._marks)
        print("", flush=True)

    def steps_of(self, title: str, prompts: list[list[int]], outputs: list[int]) -> None:
        """Runs requests and prints how long their steps took."""
        times, watched = [], Watched(self._core._runner)  # pyright: ignore[reportPrivateUsage]
        self._core._runner = watched  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        try:
            run = measure(self._llm, prompts, outputs, temperature=1.0)
        finally:
            self._core._runner = watched.runner  # pyright: ignore[reportPrivateUsage]
        times = watched.times
        print(f"\n{title}: {sum(outputs) / run.seconds:,.0f} tok/s, {len(times)} steps")
        first = [f"{1e3 * one[1]:.0f}/{one[0].num_tokens}/{one[0].num_rows}" for one in times[:24]]
        print("  first steps, ms/tokens/rows: " + ", ".join(first))
        groups: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for plan, *rest in times:
            is_decode = plan.num_rows == plan.num_tokens
            size = plan.num_rows if is_decode else plan.num_tokens
            kind = "decode" if is_decode else "prompts"
            step = 32 if is_decode else 1024
            groups[f"{kind} {-(-size // step) * step:6}"].append((rest[0], rest[1], rest[2]))
        print("  kind, up to rows or tokens: steps, s in all, ms each; host ms in launch, in wait")
        for kind, found in sorted(groups.items()):
            whole = sum(one[0] for one in found)
            mean = [1e3 * sum(one[at] for one in found) / len(found) for at in range(3)]
            shown = " ".join(f"{one:8.3f}" for one in (whole, *mean))
            print(f"  {kind}: {len(found):5} {shown}")
        print("", flush=True)


class Watched:
    """A runner whose steps are timed: from the end of the last one's wait to that of its own."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.times: list[tuple[StepPlan, float, float, float]] = []
        self._plans: dict[int, tuple[StepPlan, float]] = {}
        self._reached = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch(self, plan: StepPlan) -> object:
        began = time.perf_counter()
        ticket = self.runner.launch(plan)
        self._plans[id(ticket)] = plan, time.perf_counter() - began
        return ticket

    def collect(self, ticket: Any) -> StepResult:
        began = time.perf_counter()
        result = self.runner.collect(ticket)
        now = time.perf_counter()
        plan, launched = self._plans.pop(id(ticket))
        self.times.append((plan, now - self._reached, launched, now - began))
        self._reached = now
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", default="D1,D32,Ha,D256,Hb,T,P")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quantization")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--marks", default="_latent_write,_decode_kernel,_hopper_kernel")
    arguments = parser.parse_args()
    with temporary_folder() as folder:
        given = {
            "load_format": "dummy",
            "device": arguments.device,
            "quantization": arguments.quantization,
        }
        began = time.perf_counter()
        llm = LLM(**engine_values(arguments.model, given, Path(folder), arguments.layers))
        print(f"started in {time.perf_counter() - began:.1f} s, {llm.plan.num_tokens:,} KV tokens")
    tracer = Tracer(llm, arguments.marks.split(","))

    def prompts(count: int, length: int, seed: int) -> list[list[int]]:
        return fixed_prompts(llm.vocab_size, count, length, seed)

    def after_prefix(count: int, number: int) -> list[list[int]]:
        (prefix,) = prompts(1, PREFIX, 400)
        tails = prompts((number + 1) * count, TAIL, 401)
        return [prefix + ids for ids in tails[number * count :]]

    mixed = mixed_requests(llm.vocab_size, FULL.mixed, FULL.mixed_low, 0)
    cases: dict[str, Callable[[], None]] = {
        "D1": lambda: tracer.decode("D1, 512 tokens", prompts(1, 512, 500)),
        "D32": lambda: tracer.decode("D32, 1,024 tokens", prompts(32, 1024, 501)),
        "D64": lambda: tracer.decode("64 rows of mixed lengths", mixed[0][:64]),
        "D128": lambda: tracer.decode("128 rows of mixed lengths", mixed[0][:128]),
        "D256": lambda: tracer.decode("256 rows of mixed lengths", mixed[0]),
        "Ha": lambda: tracer.prompts("Ha", lambda number: after_prefix(1, number)),
        "Hb": lambda: tracer.prompts("Hb's first step", lambda number: after_prefix(32, number)),
        "Hd": lambda: tracer.decode("Hb's decodes", after_prefix(32, 11)),
        "M": lambda: tracer.prompts(
            "16 prompts of 512", lambda number: prompts(16, 512, 700 + number)
        ),
        "P": lambda: tracer.prompts("P 8,192", lambda number: prompts(1, 8192, 300 + number)),
        "T": lambda: tracer.steps_of("T, longest first", *mixed),
    }
    for case in arguments.cases.split(","):
        try:
            cases[case]()
        except Exception as error:  # the other cases are worth having
            print(f"{case}: {type(error).__name__}: {error}", flush=True)
        if case not in ("Ha", "Hb"):
            llm.reset_prefix_cache()
    kinds = Counter(type(one).__name__ for one in llm.plan.groups)
    print(f"plan: {llm.plan}\n{kinds}")


if __name__ == "__main__":
    main()
