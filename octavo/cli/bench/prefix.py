"""`octavo bench prefix`: what sharing prefixes saves, and what the bookkeeping for it costs.

Called by the command line. The first two figures need a model; the bookkeeping runs without one,
on scheduler and KV cache alone, with a stand-in that answers every step at once.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import tracemalloc
from array import array
from typing import TYPE_CHECKING

import numpy as np

from octavo.cli.bench.offline import load, measure
from octavo.cli.bench.report import Report, Value, progress, settings_of
from octavo.cli.bench.workload import Lengths, PromptSource
from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.records import SequenceKV
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.request import Request, SamplingParams, pack_ids
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.step import StepPlan, StepResult

if TYPE_CHECKING:
    from octavo.llm import LLM

BLOCK_SIZE = 16
TAIL = 16
"""New tokens after a shared prefix."""


def run_prefix(args: argparse.Namespace) -> int:
    """Runs the measurements with a model (if one is given), then those without."""
    report = Report(
        bench="prefix", settings=settings_of(args), output=args.output, is_kept=args.keep
    )
    if args.model:
        llm, source = load(args)
        report.add("hit against cold", measure_hit(llm, source, args.prefix_len, args.repeat))
        report.add("shared at once", measure_shared(llm, source, args.prefix_len, args.requests))
    report.add("lookup", measure_lookup(args.lookup_len, args.repeat))
    report.add("long context", measure_long(args.long_len))
    report.add("scheduler", measure_scheduler(args.sequences, args.workload_seed))
    report.add("waste", measure_waste(args.sequences, args.workload_seed))
    return 0


def measure_hit(llm: LLM, source: PromptSource, prefix_len: int, repeat: int) -> dict[str, Value]:
    """Time to first token of a prefix plus a tail, first cold, then with the prefix cached."""
    length, tail = Lengths(low=prefix_len, high=prefix_len), Lengths(low=TAIL, high=TAIL)
    cold: list[float] = []
    hit: list[float] = []
    measure(llm, source.draw(1, length, -1), [1])
    with progress("cold and hit", repeat) as done:
        for round_ in range(repeat):
            (prefix,) = source.draw(1, length, round_)
            first, second = source.draw(2, tail, round_ + repeat)
            cold.append(measure(llm, [prefix + first], [1]).ttft_seconds[0])
            hit.append(measure(llm, [prefix + second], [1]).ttft_seconds[0])
            done(1)
    cold_median, hit_median = statistics.median(cold), statistics.median(hit)
    return {
        "prefix_tokens": prefix_len,
        "cold_ttft_ms": 1e3 * cold_median,
        "hit_ttft_ms": 1e3 * hit_median,
        "hit_over_cold": hit_median / cold_median,
    }


def measure_shared(
    llm: LLM, source: PromptSource, prefix_len: int, requests: int
) -> dict[str, Value]:
    """Prompt tokens computed when requests that share a fresh prefix arrive together."""
    (prefix,) = source.draw(1, Lengths(low=prefix_len, high=prefix_len), -2)
    tails = source.draw(requests, Lengths(low=TAIL, high=TAIL), -3)
    before = llm.stats()
    run = measure(llm, [prefix + tail for tail in tails], [1] * requests)
    after = llm.stats()
    prompt = after.num_prompt_tokens - before.num_prompt_tokens
    cached = after.num_cached_prompt_tokens - before.num_cached_prompt_tokens
    return {
        "requests": requests,
        "prompt_tokens": prompt,
        "prompt_tokens_computed": prompt - cached,
        "limit": prefix_len + requests * 32,
        "seconds": run.seconds,
    }


def measure_lookup(length: int, repeat: int) -> dict[str, Value]:
    """Seconds to hash a prompt and find all its blocks, every one of them cached."""
    rng = random.Random(length)
    tokens = array("i", [rng.randrange(50_000) for _ in range(length)])
    manager = _manager(num_blocks=length // BLOCK_SIZE + 2, max_rows=1, max_model_len=length + 16)
    root = prefix_root(model="bench")
    owner = SequenceKV(root=root)
    manager.admit(owner, 0, manager.lookup(owner, tokens), length)
    manager.publish(owner, tokens, length)
    times: list[float] = []
    for _ in range(max(repeat, 3)):
        began = time.perf_counter()
        hit = manager.lookup(SequenceKV(root=root), tokens)
        times.append(time.perf_counter() - began)
        assert hit.num_blocks == (length - 1) // BLOCK_SIZE
    return {"prompt_tokens": length, "lookup_ms": 1e3 * statistics.median(times)}


def measure_long(length: int) -> dict[str, Value]:
    """Seconds of the host for the first step of a request of `length` tokens (digests, lookup,
    admission, plan), cold and with all of it cached, and the memory of what is kept for it."""
    cold, hit = _run_long(length)
    tracemalloc.start()
    scheduler = _long_scheduler(length)
    _add_long(scheduler, length, 0)
    _finish(scheduler)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not scheduler.has_unfinished
    return {
        "tokens": length,
        "cold_first_step_ms": 1e3 * cold,
        "hit_first_step_ms": 1e3 * hit,
        "kept_mib": kept / 2**20,
    }


def _run_long(length: int) -> tuple[float, float]:
    """Returns the seconds of the first step of a request, and of its like once it is cached."""
    scheduler = _long_scheduler(length)
    seconds = []
    for index in range(2):
        _add_long(scheduler, length, index)
        began = time.perf_counter()
        plan = scheduler.schedule()
        seconds.append(time.perf_counter() - began)
        assert plan is not None
        scheduler.commit(plan, _answer(plan))
        _finish(scheduler)
    return seconds[0], seconds[1]


def _long_scheduler(length: int) -> Scheduler:
    longest = length + BLOCK_SIZE
    manager = _manager(num_blocks=longest // BLOCK_SIZE + 2, max_rows=1, max_model_len=longest)
    limits = SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=8192, max_model_len=longest)
    return Scheduler(manager, limits)


def _add_long(scheduler: Scheduler, length: int, index: int) -> None:
    rng = np.random.default_rng(length)
    request = Request(
        request_id=str(index),
        packed_prompt=pack_ids(rng.integers(0, 50_000, length).tolist()),
        params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    )
    scheduler.add(request, prefix_root(model="bench"), True, [index])


def _finish(scheduler: Scheduler) -> None:
    while (plan := scheduler.schedule()) is not None:
        scheduler.commit(plan, _answer(plan))


def measure_scheduler(num_sequences: int, seed: int) -> dict[str, Value]:
    """Seconds of schedule and commit per step while all sequences decode."""
    rng = random.Random(seed)
    steps = 200
    lengths = [rng.randint(100, 1000) for _ in range(num_sequences)]
    scheduler = _filled_scheduler(lengths, [steps + 100] * num_sequences, seed)
    engine = _InstantRunner(scheduler)
    while any(sequence.num_outputs < 2 for sequence in scheduler.running) or scheduler.waiting:
        engine.step()
    seconds = [engine.step() for _ in range(steps)]
    return {
        "running_sequences": len(scheduler.running),
        "schedule_us_p50": 1e6 * statistics.median(s for s, _ in seconds),
        "commit_us_p50": 1e6 * statistics.median(c for _, c in seconds),
        "step_us_p50": 1e6 * statistics.median(s + c for s, c in seconds),
        "step_us_max": 1e6 * max(s + c for s, c in seconds),
    }


def measure_waste(num_sequences: int, seed: int) -> dict[str, Value]:
    """Share of the used KV slots that hold no token, sampled over a run of mixed lengths."""
    rng = random.Random(seed)
    totals = [rng.randint(100, 1000) for _ in range(num_sequences)]
    prompts = [rng.randint(total // 4, total * 3 // 4) for total in totals]
    outputs = [total - prompt for total, prompt in zip(totals, prompts, strict=True)]
    scheduler = _filled_scheduler(prompts, outputs, seed)
    engine = _InstantRunner(scheduler)
    shares: list[float] = []
    while scheduler.has_unfinished:
        engine.step()
        used = scheduler.manager.pools.num_referenced * BLOCK_SIZE
        if used:
            held = sum(sequence.num_computed for sequence in scheduler.running)
            shares.append(1 - held / used)
    return {
        "sequences": num_sequences,
        "lengths": f"{min(totals)}..{max(totals)}",
        "waste_share_mean": statistics.mean(shares),
        "waste_share_max": max(shares),
    }


class _InstantRunner:
    """Runs steps one ahead, as the engine does, with a device that takes no time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._launched: StepPlan | None = None

    def step(self) -> tuple[float, float]:
        """Returns the seconds of one schedule and of one commit."""
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        scheduled = time.perf_counter()
        committed = scheduled
        if self._launched is not None:
            result = _answer(self._launched)
            started = time.perf_counter()
            self._scheduler.commit(self._launched, result)
            committed = scheduled + time.perf_counter() - started
        self._launched = plan
        return scheduled - began, committed - scheduled


def _answer(plan: StepPlan) -> StepResult:
    tokens = np.full(int(plan.samples.sum()), 7, dtype=np.int32)
    return StepResult.single(plan, tokens)


def _manager(*, num_blocks: int, max_rows: int, max_model_len: int) -> KVCacheManager:
    spec = attention_kv(3, 64, kv_format("float32"))
    return KVCacheManager(
        group_layers((spec,) * 30),
        num_chunks=num_blocks,
        block_size=BLOCK_SIZE,
        max_rows=max_rows,
        max_model_len=max_model_len,
    )


def _filled_scheduler(prompts: list[int], outputs: list[int], seed: int) -> Scheduler:
    """Returns a scheduler with one waiting request per prompt, and blocks for all of them."""
    rng = random.Random(seed)
    longest = max(p + o for p, o in zip(prompts, outputs, strict=True)) + BLOCK_SIZE
    manager = _manager(
        num_blocks=len(prompts) * (longest // BLOCK_SIZE + 2),
        max_rows=len(prompts),
        max_model_len=longest,
    )
    limits = SchedulerLimits(
        max_num_seqs=len(prompts), max_num_batched_tokens=8192, max_model_len=longest
    )
    scheduler = Scheduler(manager, limits)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        request = Request(
            request_id=str(index),
            packed_prompt=pack_ids(rng.randrange(50_000) for _ in range(prompt)),
            params=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )
        scheduler.add(request, prefix_root(model="bench"), True, [index])
    return scheduler
