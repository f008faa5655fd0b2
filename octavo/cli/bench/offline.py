"""`octavo bench latency` and `throughput`: the engine in this process, without HTTP.

Called by the command line. Prompts are new in every round, so that no prefix is ever found;
sequences ignore the end token, so that every run computes the same number of tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.cli.bench.report import Report, Value, percentiles, progress, settings_of
from octavo.cli.bench.workload import PromptSource, read_text_ids
from octavo.cli.options import config_values
from octavo.config import EngineConfig
from octavo.device import CPUDevice, select_device
from octavo.errors import OctavoError
from octavo.outputs import RequestOutput
from octavo.request import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of a batch."""

    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    ttft_seconds: tuple[float, ...]
    tpot_seconds: tuple[float, ...]
    """Per request: time after the first token over the tokens after the first."""


def run_latency(args: argparse.Namespace) -> int:
    """One batch at a time: time to first token, time per output token, rates."""
    llm, source = load(args)
    report = _report("latency", args)

    def prompts(round_: int) -> list[list[int]]:
        return source.draw(args.batch_size, args.input_len, round_)

    outputs = [args.output_len.high] * args.batch_size
    measure(llm, prompts(-1), outputs)
    with progress("latency", args.repeat) as done:
        runs: list[Measured] = []
        for round_ in range(args.repeat):
            runs.append(measure(llm, prompts(round_), outputs))
            done(1)
    figures = _figures(_median(runs), llm)
    if args.peer:
        figures |= _peer_figures(args, figures, prompts, args.output_len.high)
    report.add(f"batch {args.batch_size}", figures)
    return 0


def run_throughput(args: argparse.Namespace) -> int:
    """All requests at once; the engine batches as it sees fit."""
    llm, source = load(args)
    report = _report("throughput", args)
    rng = random.Random(args.workload_seed)
    prompts = source.draw(args.num_prompts, args.input_len)
    outputs = [args.output_len.draw(rng) for _ in prompts]
    measure(llm, source.draw(1, args.input_len, -1), [2])
    with progress("throughput", len(prompts)) as done:
        run = measure(llm, prompts, outputs)
        done(len(prompts))
    figures = _figures(run, llm)
    if args.peer:
        figures |= _peer_figures(args, figures, lambda _: prompts, args.output_len.high)
    report.add(f"{len(prompts)} requests", figures)
    return 0


def _report(bench: str, args: argparse.Namespace) -> Report:
    from octavo.cli.bench.device_profile import card_name

    config = EngineConfig(model=args.model, **config_values(args, EngineConfig)).resolve()
    return Report(
        bench=bench,
        settings=settings_of(args),
        output=args.output,
        computes_on=card_name(select_device(config.device).torch_name),
        is_kept=args.keep,
    )


def load(args: argparse.Namespace) -> tuple[LLM, PromptSource]:
    """Returns the engine and where its prompts come from. Raises ConfigError, also for a peer
    that is not there, before anything is measured."""
    from octavo.llm import LLM

    if vars(args).get("peer"):
        from octavo.cli.bench.peer import check_peer

        check_peer()

    llm = LLM(args.model, **config_values(args, EngineConfig))
    text_ids = read_text_ids(args.text, lambda text: llm.tokenizer.encode(text))
    return llm, PromptSource(vocab_size=llm.vocab_size, seed=args.workload_seed, text_ids=text_ids)


def measure(
    llm: LLM,
    prompts: list[list[int]],
    num_outputs: list[int],
    temperature: float = 0.0,
    *,
    in_order: bool = False,
) -> Measured:
    """Runs a batch to its end: longest first, as `LLM.generate` does, or in the order given.

    Raises OctavoError if a request did not get all its tokens.
    """
    params = [
        SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in num_outputs
    ]
    began = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        params,
        use_tqdm=False,
        priority=range(len(prompts)) if in_order else None,
    )
    seconds = time.perf_counter() - began
    for output, wanted in zip(outputs, num_outputs, strict=True):
        if len(output.outputs[0].token_ids) != wanted:
            raise OctavoError(
                f"request {output.request_id} made {len(output.outputs[0].token_ids)} of {wanted} "
                f"tokens (finish reason {output.outputs[0].finish_reason})"
            )
    return Measured(
        seconds=seconds,
        num_prompt_tokens=sum(map(len, prompts)),
        num_output_tokens=sum(num_outputs),
        num_cached_tokens=sum(output.num_cached_tokens for output in outputs),
        ttft_seconds=tuple(ttft(output) for output in outputs),
        tpot_seconds=tuple(
            _tpot(output, n) for output, n in zip(outputs, num_outputs, strict=True) if n > 1
        ),
    )


def ttft(output: RequestOutput) -> float:
    """Returns the seconds from arrival to the first token."""
    metrics = output.metrics
    assert metrics is not None
    assert metrics.first_token_time is not None
    return metrics.first_token_time - metrics.arrival_time


def _tpot(output: RequestOutput, num_outputs: int) -> float:
    metrics = output.metrics
    assert metrics is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    return (metrics.finished_time - metrics.first_token_time) / (num_outputs - 1)


def _median(runs: list[Measured]) -> Measured:
    return sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]


def _figures(run: Measured, llm: LLM) -> dict[str, Value]:
    stats = llm.stats()
    last_ttft = max(run.ttft_seconds)
    return {
        "seconds": run.seconds,
        "output_tokens_per_second": run.num_output_tokens / run.seconds,
        "total_tokens_per_second": (run.num_output_tokens + run.num_prompt_tokens) / run.seconds,
        "prefill_tokens_per_second": run.num_prompt_tokens / last_ttft,
        **percentiles("ttft", run.ttft_seconds, (50, 99)),
        **percentiles("tpot", run.tpot_seconds, (50, 99)),
        "num_preemptions": stats.num_preemptions,
        "scheduler_us_per_step": 1e6 * stats.scheduler_seconds / max(stats.num_steps, 1),
        "weights_bytes": llm.plan.weights_bytes,
        "kv_bytes": llm.plan.kv_bytes,
        "peak_rss_bytes": CPUDevice().peak_memory_bytes(),
    }


def _peer_figures(
    args: argparse.Namespace,
    ours: Mapping[str, Value],
    prompts: Callable[[int], list[list[int]]],
    num_outputs: int,
) -> dict[str, Value]:
    """Runs the peer on the same batches; ratios above 1 mean that Octavo is faster."""
    from octavo.cli.bench.peer import TransformersPeer
    from octavo.weights.hub import resolve_model

    peer = TransformersPeer(resolve_model(args.model).path, vars(args).get("num_threads"))
    peer.generate(prompts(-1), min(num_outputs, 4))
    seconds: list[float] = []
    first: list[float] = []
    with progress(f"peer {args.peer}", args.repeat) as done:
        for round_ in range(args.repeat):
            batch = prompts(round_)
            seconds.append(peer.generate(batch, num_outputs))
            first.append(peer.generate(batch, 1) if num_outputs > 1 else seconds[-1])
            done(1)
    num_prompts = len(prompts(0))
    peer_seconds, peer_first = statistics.median(seconds), statistics.median(first)
    peer_rate = num_prompts * num_outputs / peer_seconds
    peer_prefill = sum(map(len, prompts(0))) / peer_first
    figures: dict[str, Any] = dict(ours)
    return {
        "peer_seconds": peer_seconds,
        "peer_output_tokens_per_second": peer_rate,
        "peer_prefill_tokens_per_second": peer_prefill,
        "ratio_output_tokens_per_second": figures["output_tokens_per_second"] / peer_rate,
        "ratio_prefill_tokens_per_second": figures["prefill_tokens_per_second"] / peer_prefill,
    }
