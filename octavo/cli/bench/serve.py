"""`octavo bench serve`: load on a running OpenAI-compatible server, measured from the client.

Called by the command line. Speaks HTTP only, so any server with /v1/completions can be measured;
never imports the engine. The clients themselves are `bench.client`, one process or several.
"""

from __future__ import annotations

import argparse
import random
import secrets
from collections.abc import Sequence
from typing import Any

from octavo.cli.bench.client import Load, Served, Shot, Target
from octavo.cli.bench.client_process import run_clients
from octavo.cli.bench.report import Report, Value, percentiles, progress, settings_of
from octavo.cli.bench.workload import Lengths, PromptSource
from octavo.cli.chat import client_options, first_model
from octavo.cli.options import say
from octavo.errors import ConfigError, OctavoError

POINTS = (50, 90, 99)
NUM_PROMPTS = 64
BUSY_CLIENT = 0.8
"""Of a core: a client that needs more is part of what it measures."""


def run_serve(args: argparse.Namespace) -> int:
    """Sends all requests at the wanted rate and reports what came back."""
    seed = secrets.randbits(48) if args.workload_seed is None else args.workload_seed
    loads = loads_of(args, seed)
    settings = settings_of(args) | {"prompt_seed": seed}
    report = Report(bench="serve", settings=settings, output=args.output, is_kept=args.keep)
    with progress("serve", sum(len(load.shots) for load in loads)) as done:
        results, start = run_clients(loads, done)
    served = [one for result in results for one in result.served]
    good = [one for one in served if one.error is None]
    if not good:
        reason = served[0].error
        raise OctavoError(f"all {len(served)} requests failed; the first one: {reason}")
    seconds = max(one.finished for one in served) - start
    busiest = max(result.cpu_share for result in results)
    figures = figures_of(good, len(served), seconds, args.goodput) | {"client_cpu_share": busiest}
    report.add(f"{len(served)} requests", figures)
    _warn(figures, busiest)
    failed = [one.error for one in served if one.error is not None]
    if failed:
        say(f"{len(failed)} of {len(served)} requests failed; the first one: {failed[0]}")
    return 1 if failed else 0


def _warn(figures: dict[str, Any], busiest: float) -> None:
    """Says what makes the figures other than they seem."""
    cached, prompts = figures["cached_prompt_tokens"], figures["prompt_tokens"]
    if cached > prompts // 4:
        say(
            f"note: the server had {cached:,} of {prompts:,} prompt tokens in its prefix cache, so "
            "first tokens came early; without --workload-seed every run has new prompts"
        )
    if busiest > BUSY_CLIENT:
        say(f"note: a client used {busiest:.0%} of a core and is measured too; use more --clients")


def loads_of(args: argparse.Namespace, seed: int) -> list[Load]:
    """Returns what each client process sends. Raises ConfigError for options that do not fit."""
    count = args.num_prompts or (args.concurrency or 0) * args.waves or NUM_PROMPTS
    streams = min(args.concurrency or count, count)
    if args.clients > streams:
        raise ConfigError(
            f"--clients {args.clients} is more than the {streams} requests that are open at once; "
            f"use at most {streams}",
            field="clients",
        )
    # Lengths and arrivals are those of every run, so that two runs have the same load.
    rng = random.Random(args.workload_seed or 0)
    source = PromptSource(vocab_size=args.vocab_size, seed=seed)
    at, shots = 0.0, []
    for index in range(count):
        length = args.input_len.draw(rng)
        (prompt,) = source.draw(1, Lengths(low=length, high=length), index)
        shots.append(Shot(prompt=prompt, max_tokens=args.output_len.draw(rng), at=at))
        at += rng.expovariate(args.request_rate) if args.request_rate else 0.0
    target = _target(args)
    return [
        Load(
            target=target,
            # By streams, so that those of all processes get equally many.
            shots=[shot for i, shot in enumerate(shots) if i % streams % args.clients == index],
            num_streams=streams // args.clients + (index < streams % args.clients),
        )
        for index in range(args.clients)
    ]


def _target(args: argparse.Namespace) -> Target:
    import httpx

    options = client_options(args.url, args.api_key)
    with httpx.Client(**options) as client:
        model = args.served_model or first_model(client)
    body: dict[str, Any] = {
        "model": model,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.ignore_eos:
        body["ignore_eos"] = True
    return Target(url=options["base_url"] + "/v1/completions", api_key=args.api_key, body=body)


def figures_of(
    good: list[Served], num_sent: int, seconds: float, goals: list[tuple[str, float]]
) -> dict[str, Value]:
    """Returns rates, and percentiles of the times, over the requests that succeeded."""
    outputs = sum(one.num_output_tokens for one in good)
    later = [one.ttft for one in good if not one.is_first_of_stream]
    figures: dict[str, Value] = {
        "seconds": seconds,
        "num_succeeded": len(good),
        "num_failed": num_sent - len(good),
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": outputs / seconds,
        "prompt_tokens": sum(one.num_prompt_tokens for one in good),
        "cached_prompt_tokens": sum(one.num_cached_tokens for one in good),
        "output_tokens": outputs,
        "output_events": sum(len(one.token_times) for one in good),
        **_times("ttft", [one.ttft for one in good]),
        **_times("ttft_after_first_wave", later),
        **_times("tpot", [one.tpot for one in good if one.num_output_tokens > 1]),
        **_times("itl", [gap for one in good for gap in one.gaps]),
        **_times("e2e", [one.finished - one.started for one in good]),
    }
    if goals:
        met = sum(all(_time(one, name) <= limit for name, limit in goals) for one in good)
        figures["goodput_requests_per_second"] = met / seconds
        figures["goodput_share"] = met / num_sent
    return figures


def _times(name: str, seconds: Sequence[float]) -> dict[str, Value]:
    """Returns percentiles, and how far the slowest are from the middle."""
    figures: dict[str, Any] = dict(percentiles(name, seconds, POINTS))
    if figures and figures[f"{name}_p50_ms"]:
        figures[f"{name}_p99_over_p50"] = figures[f"{name}_p99_ms"] / figures[f"{name}_p50_ms"]
    return figures


def _time(one: Served, name: str) -> float:
    return {"ttft": one.ttft, "tpot": one.tpot, "e2e": one.finished - one.started}[name]
