"""`octavo bench serve`: load on a running OpenAI-compatible server, measured from the client.

Called by the command line. Speaks HTTP only, so any server with /v1/completions can be measured;
never imports the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.cli.bench.report import Report, Value, percentiles, progress, settings_of
from octavo.cli.bench.workload import PromptSource
from octavo.cli.chat import client_options, event_of, first_model
from octavo.errors import OctavoError

if TYPE_CHECKING:
    import httpx

POINTS = (50, 90, 99)


@dataclass(slots=True, kw_only=True)
class Served:
    """What the client saw of one request."""

    started: float
    token_times: list[float] = field(default_factory=list)
    """One for each chunk with text."""
    finished: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def tpot(self) -> float:
        """Time after the first token over the tokens after the first."""
        return (self.finished - self.token_times[0]) / max(self.num_output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


def run_serve(args: argparse.Namespace) -> int:
    """Sends all requests at the wanted rate and reports what came back."""
    report = Report(bench="serve", settings=settings_of(args), output=args.output)
    served, seconds = asyncio.run(_drive(args))
    good = [one for one in served if one.error is None]
    if not good:
        reason = served[0].error
        raise OctavoError(f"all {len(served)} requests failed; the first one: {reason}")
    report.add(f"{len(served)} requests", figures_of(good, len(served), seconds, args.goodput))
    return 0 if len(good) == len(served) else 1


def figures_of(
    good: list[Served], num_sent: int, seconds: float, goals: list[tuple[str, float]]
) -> dict[str, Value]:
    """Returns rates, and percentiles of the times, over the requests that succeeded."""
    outputs = sum(one.num_output_tokens for one in good)
    figures: dict[str, Value] = {
        "seconds": seconds,
        "num_succeeded": len(good),
        "num_failed": num_sent - len(good),
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": outputs / seconds,
        "prompt_tokens": sum(one.num_prompt_tokens for one in good),
        "cached_prompt_tokens": sum(one.num_cached_tokens for one in good),
        "output_tokens": outputs,
        **percentiles("ttft", [one.ttft for one in good], POINTS),
        **percentiles("tpot", [one.tpot for one in good if one.num_output_tokens > 1], POINTS),
        **percentiles("itl", [gap for one in good for gap in one.gaps], POINTS),
        **percentiles("e2e", [one.finished - one.started for one in good], POINTS),
    }
    if goals:
        met = sum(all(_time(one, name) <= limit for name, limit in goals) for one in good)
        figures["goodput_requests_per_second"] = met / seconds
        figures["goodput_share"] = met / num_sent
    return figures


def _time(one: Served, name: str) -> float:
    return {"ttft": one.ttft, "tpot": one.tpot, "e2e": one.finished - one.started}[name]


async def _drive(args: argparse.Namespace) -> tuple[list[Served], float]:
    import httpx

    rng = random.Random(args.workload_seed)
    source = PromptSource(vocab_size=args.vocab_size, seed=args.workload_seed)
    prompts = source.draw(args.num_prompts, args.input_len)
    options = client_options(args.url, args.api_key)
    with httpx.Client(**options) as client:
        model = args.served_model or first_model(client)
    limits = httpx.Limits(max_connections=None)
    options["timeout"] = httpx.Timeout(600)  # a loaded server may be slow to take a connection
    async with httpx.AsyncClient(**options, limits=limits) as client:
        gate = asyncio.Semaphore(args.max_concurrency or len(prompts))
        tasks: list[asyncio.Task[Served]] = []
        with progress("serve", len(prompts)) as done:
            began = time.perf_counter()
            for prompt in prompts:
                body = _body(model, prompt, args.output_len.draw(rng))
                task = asyncio.create_task(_one(client, gate, body))
                task.add_done_callback(lambda _: done(1))
                tasks.append(task)
                if args.request_rate:
                    await asyncio.sleep(rng.expovariate(args.request_rate))
            served = await asyncio.gather(*tasks)
            return served, time.perf_counter() - began


def _body(model: str, prompt: list[int], num_outputs: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_outputs,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _one(client: httpx.AsyncClient, gate: asyncio.Semaphore, body: dict[str, Any]) -> Served:
    """Sends one request and notes when its pieces arrive."""
    import httpx

    async with gate:
        served = Served(started=time.perf_counter())
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")
                    served.error = f"HTTP {answer.status_code}: {text[:300]}"
                    return served
                async for line in answer.aiter_lines():
                    _read_event(served, line)
        except (httpx.HTTPError, ValueError) as error:
            served.error = f"{type(error).__name__}: {error}"
        served.finished = time.perf_counter()
        if served.error is None and not served.token_times:
            served.error = "the stream ended without a token"
        return served


def _read_event(served: Served, line: str) -> None:
    event = event_of(line)
    if "error" in event:
        served.error = str(event["error"])
    if event.get("choices"):
        served.token_times.append(time.perf_counter())
    usage = event.get("usage")
    if usage:
        served.num_prompt_tokens = usage["prompt_tokens"]
        served.num_output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        served.num_cached_tokens = details.get("cached_tokens") or 0
