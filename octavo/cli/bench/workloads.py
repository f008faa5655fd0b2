"""`octavo bench workloads`: the named workloads that engines are compared by, with their floors.

Called by the command line. Requests, warm-up and definitions are those the peer was measured with:
prompts are new in every repeat, tokens are drawn at temperature 1, and the time per output token
is (a full run - a run of one output token) / (output tokens - 1).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli.bench.floors import CEILINGS, Floors, Work
from octavo.cli.bench.long_document import run_shared
from octavo.cli.bench.offline import Measured, measure
from octavo.cli.bench.report import Report, Value, settings_of
from octavo.cli.bench.shapes import (
    FULL,
    MARKS,
    NAMES,
    QUICK,
    USUAL,
    Batch,
    engine_values,
    fixed_prompts,
    mixed_requests,
)
from octavo.cli.options import config_values, say
from octavo.config import EngineConfig
from octavo.device import Device, select_device
from octavo.errors import ConfigError, OctavoError
from octavo.folders import temporary_folder
from octavo.formats import kv_formats

if TYPE_CHECKING:
    from octavo.cli.bench.device_profile import DeviceProfile
    from octavo.llm import LLM

PROFILED_STEPS = 32


def run_workloads(args: argparse.Namespace) -> int:
    """Loads the model and runs the workloads; 1 if one failed, the others are reported."""
    with temporary_folder() as folder:
        given = config_values(args, EngineConfig)
        values = engine_values(args.model, given, Path(folder), args.layers)
        device = select_device(EngineConfig(**values).resolve().device)
        if args.only and "K" in args.only and device.name == "cpu":
            raise ConfigError("workload K profiles a CUDA device, not cpu; leave it out of --only")
        from octavo.llm import LLM

        began = time.perf_counter()
        llm = LLM(**values)
        bench = Workloads(llm, args, device)
        bench.report_start(time.perf_counter() - began)
        names = args.only or USUAL
        bench.warm_up(names)
        return bench.run(names)


class Workloads:
    """One loaded engine and what is known of it."""

    def __init__(self, llm: LLM, args: argparse.Namespace, device: Device) -> None:
        from octavo.cli.bench.device_profile import card_name

        self._llm = llm
        self._device = device
        self._first_seed = 10_000 * args.workload_seed
        self._sizes = QUICK.within(llm.plan.max_model_len) if args.quick else FULL
        is_whole = not (args.quick or args.layers)
        self._marks = MARKS.get(args.model, {}) if is_whole else {}
        card = card_name(device.torch_name)
        self._ceilings = CEILINGS.get(card)
        self._floors = Floors(
            llm.spec,
            element_bytes=llm.plan.weights_bytes / llm.spec.num_parameters,
            kv=kv_formats(llm.plan.groups[0].spec.formats),
        )
        self._report = Report(
            bench="workloads",
            settings=settings_of(args),
            output=args.output,
            is_kept=args.keep,
            computes_on=card,
        )

    def report_start(self, seconds: float) -> None:
        """Reports the constructor's seconds and the memory that came of it."""
        plan = self._llm.plan
        more: dict[str, Value] = {
            "weights_bytes": plan.weights_bytes,
            "activation_bytes": plan.activation_bytes,
            "kv_bytes": plan.kv_bytes,
            "kv_tokens": plan.num_tokens,
            "max_model_len": plan.max_model_len,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "max_num_seqs": self._llm.config.max_num_seqs,
        }
        if "kv_tokens" in self._marks:
            mark = self._marks["kv_tokens"]
            more |= {"kv_tokens_peer": mark.peer, "kv_tokens_goal": mark.goal}
        self._add("start", "s", [seconds], more=more | self._memory())

    def warm_up(self, names: Sequence[str]) -> None:
        """Walks every shape of the workloads once, so that run-time compilation is done."""
        began, sizes, wanted = time.perf_counter(), self._sizes, set(names)
        if "L128" in wanted:
            self._generate(self._prompts(1, sizes.readers.prompt, 905), 1)
        if wanted & {"P", "Ha", "Hb", "K"}:
            for length in sizes.prefills:
                self._generate(self._prompts(1, length, 900), 1)
        if wanted & {"D32", "Hb", "K"}:
            for seed in (901, 904):
                prompts = self._prompts(sizes.batch.requests, sizes.batch.prompt, seed)
                self._generate(prompts, max(sizes.batch.output // 4, 1))
        if "Hb" in wanted:
            for tail in (0, sizes.shared.requests):  # the second time steps become graphs
                self._after_prefix(sizes.shared.requests, 2, tail)
        if wanted & {"D1", "K"}:
            outputs = min(8, sizes.single.output)
            self._generate(self._prompts(1, sizes.single.prompt, 902), outputs)
        if "T" in wanted:
            low = 2 * sizes.mixed_low
            short = Batch(requests=sizes.mixed.requests, prompt=low, output=low, repeats=1)
            self._generate(*self._mixed_requests(short, 903))
        self._add("warm-up", "s", [time.perf_counter() - began], more=self._memory())

    def run(self, names: Sequence[str]) -> int:
        """Runs the workloads called `names`; returns the exit code."""
        sizes = self._sizes
        jobs: dict[str, Callable[[], None]] = {
            "D1": lambda: self.decode("D1", sizes.single, 100),
            "D32": lambda: self.decode("D32", sizes.batch, 200),
            "P": self.prefill,
            "Ha": self.hit,
            "Hb": self.shared,
            "T": self.mixed,
            "K": self.kernels,
            "L128": self.document,
        }
        code = 0
        for name in (name for name in NAMES if name in names):
            self._llm.reset_prefix_cache()
            try:
                jobs[name]()
            except OctavoError as error:  # the other workloads are worth having
                self._report.add(name, {"error": f"{type(error).__name__}: {error}"})
                code = 1
        if self._device.name != "cpu":
            self._report.add("memory", self._memory())
        return code

    # -- workloads -----------------------------------------------------------------------------

    def decode(self, name: str, batch: Batch, seed: int) -> None:
        """Time per output token of requests that run side by side."""
        ones: list[float] = []
        fulls: list[float] = []
        for repeat in range(batch.repeats):
            first, second = (
                self._prompts(batch.requests, batch.prompt, seed + 2 * repeat + more)
                for more in (0, 1)
            )
            ones.append(self._generate(first, 1).seconds)
            fulls.append(self._generate(second, batch.output).seconds)
        middle = batch.prompt + batch.output // 2
        self._add(
            name,
            "ms",
            [(full - one) / (batch.output - 1) for one, full in zip(ones, fulls, strict=True)],
            typical=(statistics.median(fulls) - statistics.median(ones)) / (batch.output - 1),
            floor=self._seconds(self._floors.step([(1, middle)] * batch.requests)),
            more={**batch.sizes, "one_token_seconds": ones, "full_seconds": fulls},
        )

    def prefill(self) -> None:
        """Rate of one cold prompt."""
        for length in self._sizes.prefills:
            runs: list[Measured] = []
            for repeat in range(self._sizes.prefill_repeats):
                self._llm.reset_prefix_cache()
                runs.append(self._generate(self._prompts(1, length, 300 + repeat), 1))
            self._add(
                f"P {length}",
                "tok/s",
                [run.seconds for run in runs],
                count=length,
                floor=self._seconds(self._floors.step([(length, 0)])),
                more={"cached_tokens": [run.num_cached_tokens for run in runs]},
            )

    def hit(self) -> None:
        """Time to first token of a cached prefix with a fresh tail."""
        sizes = self._sizes
        cold = self._after_prefix(1, 1)
        runs = [self._after_prefix(1, 1, 1 + repeat) for repeat in range(sizes.prefix_repeats)]
        self._add(
            "Ha",
            "ms",
            [run.seconds for run in runs],
            floor=self._seconds(self._floors.step([(sizes.shared.prompt, 0)], shared=sizes.prefix)),
            more={
                "prefix": sizes.prefix,
                "fresh": sizes.shared.prompt,
                "cold_seconds": cold.seconds,
                "cached_tokens": [run.num_cached_tokens for run in runs],
            },
        )

    def shared(self) -> None:
        """Output rate of a batch whose requests share one cached prefix."""
        batch, prefix = self._sizes.shared, self._sizes.prefix
        self._after_prefix(1, 1)
        ones: list[Measured] = []
        runs: list[Measured] = []
        for repeat in range(batch.repeats):
            tails = 1 + self._sizes.prefix_repeats + 2 * repeat * batch.requests
            ones.append(self._after_prefix(batch.requests, 1, tails))
            runs.append(self._after_prefix(batch.requests, batch.output, tails + batch.requests))
        first = self._floors.step([(batch.prompt, 0)] * batch.requests, shared=prefix)
        middle = batch.prompt + batch.output // 2
        step = self._floors.step([(1, middle)] * batch.requests, shared=prefix)
        head, rest = self._seconds(first), self._seconds(step)
        pairs = zip(ones, runs, strict=True)
        self._add(
            "Hb",
            "tok/s",
            [run.seconds for run in runs],
            count=batch.requests * batch.output,
            floor=None if head is None or rest is None else head + rest * (batch.output - 1),
            more=batch.sizes
            | {
                "prefix": prefix,
                "tpot_ms": [1e3 * (f.seconds - o.seconds) / (batch.output - 1) for o, f in pairs],
                "cached_tokens": [run.num_cached_tokens for run in runs],
            },
        )

    def document(self) -> None:
        """Output rate of requests with a long document before them, once all prompts are in."""
        batch, length = self._sizes.readers, self._sizes.document
        (document,) = self._prompts(1, length, 600)
        *tails, last = self._prompts(batch.requests + 1, batch.prompt, 601)
        (fresh,) = self._prompts(1, 64, 602)
        cold = self._generate([document], 1)
        own = self._generate([document + last], 1)
        near = self._generate([document + last + fresh], 1)
        run = run_shared(self._llm.core, [document + tail for tail in tails], batch.output)
        middle = [(1, batch.prompt + batch.output // 2)] * batch.requests
        step = self._seconds(self._floors.step(middle, shared=length))
        self._add(
            "L128",
            "tok/s",
            [run.seconds - run.prompt_seconds],
            count=run.later_tokens,
            floor=None if step is None else step * run.later_tokens / batch.requests,
            more=batch.sizes
            | {
                "document": length,
                "document_seconds": cold.seconds,
                "own_prompt_ttft_ms": 1e3 * own.seconds,
                "own_prompt_floor_ms": self._ms(self._floors.step([(batch.prompt, length)])),
                "cached_prompt_ttft_ms": 1e3 * near.seconds,
                "whole_run_rate": batch.requests * batch.output / (cold.seconds + run.seconds),
                "kv_waste_share": run.waste_share,
            }
            | self._memory(),
        )

    def mixed(self) -> None:
        """Output rate of many requests of mixed lengths that are there at once, in both orders."""
        for name, in_order in (("T", False), ("T in the order given", True)):
            self._mixed(name, in_order)

    def _mixed(self, name: str, in_order: bool) -> None:
        batch = self._sizes.mixed
        prompts, outputs = self._mixed_requests(batch, 0)
        seconds: list[float] = []
        before = self._llm.stats().num_preemptions
        for _ in range(batch.repeats):
            self._llm.reset_prefix_cache()
            seconds.append(self._generate(prompts, outputs, in_order=in_order).seconds)
        self._add(
            name,
            "tok/s",
            seconds,
            count=sum(outputs),
            floor=self._seconds(self._floors.mixed([len(ids) for ids in prompts], outputs)),
            more={
                "order": "as given" if in_order else "longest first",
                "requests": batch.requests,
                "input_tokens": sum(map(len, prompts)),
                "output_tokens": sum(outputs),
                "num_preemptions": self._llm.stats().num_preemptions - before,
                "seconds": seconds,
            },
        )

    def kernels(self) -> None:
        """Share of the time that the device computes, and its longest kernels."""
        if self._device.name == "cpu":
            say("workload K is left out: it profiles a CUDA device, this engine runs on cpu")
            return
        from octavo.cli.bench.device_profile import profile_decode, record

        for name, batch in (("K D32", self._sizes.batch), ("K D1", self._sizes.single)):
            prompts = self._prompts(batch.requests, batch.prompt, 500)
            wall, profile = profile_decode(self._llm.core, prompts, PROFILED_STEPS)
            self._add_profile(name, profile, wall, PROFILED_STEPS)
            self._llm.reset_prefix_cache()
        length = self._sizes.prefills[0]
        wall = self._generate(self._prompts(1, length, 501), 1).seconds
        fresh = self._prompts(1, length, 502)
        self._add_profile(f"K P {length}", record(lambda: self._generate(fresh, 1)), wall, 1)

    # -- parts ---------------------------------------------------------------------------------

    def _prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        return fixed_prompts(self._llm.vocab_size, count, length, self._first_seed + seed)

    def _mixed_requests(self, batch: Batch, seed: int) -> tuple[list[list[int]], list[int]]:
        seed += self._first_seed
        return mixed_requests(self._llm.vocab_size, batch, self._sizes.mixed_low, seed)

    def _memory(self) -> dict[str, Value]:
        """What the driver says is in use, and how far that is from the plan."""
        memory, plan = self._device.memory(), self._llm.plan
        used, planned = (
            memory.total_bytes - memory.available_bytes,
            plan.other_bytes + plan.total_bytes,
        )
        return {
            "device_used_bytes": used,
            "planned_bytes": planned,
            "used_beside_plan_share": used / planned - 1,
        }

    def _generate(
        self, prompts: list[list[int]], outputs: int | list[int], *, in_order: bool = False
    ) -> Measured:
        counts = [outputs] * len(prompts) if isinstance(outputs, int) else outputs
        return measure(self._llm, prompts, counts, temperature=1.0, in_order=in_order)

    def _after_prefix(self, count: int, outputs: int, tail: int = 0) -> Measured:
        """Runs `count` requests of H: its prefix, then the tails from number `tail` on."""
        (prefix,) = self._prompts(1, self._sizes.prefix, 400)
        tails = self._prompts(tail + count, self._sizes.shared.prompt, 401)[tail:]
        return self._generate([prefix + ids for ids in tails], outputs)

    def _seconds(self, work: Work) -> float | None:
        return None if self._ceilings is None else work.seconds(self._ceilings)

    def _ms(self, work: Work) -> float | None:
        seconds = self._seconds(work)
        return None if seconds is None else 1e3 * seconds

    def _add(
        self,
        name: str,
        unit: str,
        seconds: list[float],
        *,
        typical: float | None = None,
        count: int = 1,
        floor: float | None = None,
        more: dict[str, Value],
    ) -> None:
        """Reports repeats that took `seconds`; `count` tokens each where the unit is a rate."""

        def figure(spent: float) -> float:
            return {"s": spent, "ms": 1e3 * spent, "tok/s": count / spent}[unit]

        median = statistics.median(seconds) if typical is None else typical
        figures: dict[str, Value] = {
            "unit": unit,
            "median": figure(median),
            "best": figure(min(seconds)),
            "repeats": [figure(spent) for spent in seconds],
        }
        if floor is not None:
            figures |= {"floor": figure(floor), "share_of_floor": floor / median}
        self._report.add(name, figures | self._held_against(name) | more)

    def _held_against(self, name: str) -> dict[str, Value]:
        mark = self._marks.get(name)
        pairs = {} if mark is None else {"peer": mark.peer, "goal": mark.goal}
        return {key: value for key, value in pairs.items() if value is not None}

    def _add_profile(self, name: str, profile: DeviceProfile, wall: float, steps: int) -> None:
        """`wall` is what the same work took without the profiler."""
        figures: dict[str, Value] = {**profile.figures(wall, steps)}
        self._report.add(name, figures | self._held_against(name))
