"""`octavo bench compare`: two OpenAI-compatible servers on the same requests, in turn.

Called by the command line. Speaks HTTP only. A round is one set of requests, sent to one server and
then to the other; who is first changes from round to round, so that what drifts hits both. A ratio
is of one round, and its spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.cli.bench.client import Load, Served, Shot, Target
from octavo.cli.bench.client_process import run_clients
from octavo.cli.bench.report import Report, Value, progress, settings_of
from octavo.cli.chat import client_options, first_model
from octavo.cli.options import say
from octavo.errors import ConfigError, OctavoError

NAMES = ("a", "b")
HIGHER_IS_BETTER = ("output_tokens_per_second", "requests_per_second")
LOWER_IS_BETTER = ("ttft_p50_ms", "tpot_p50_ms", "e2e_p50_ms")
FIGURES = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
WORD_LETTERS = 4
"""A random word of so many letters and a space is some two or three tokens."""
TOKENS_OF_WORD = 2.5
UNEQUAL = 1.05
"""Answers longer than this times the other server's are said to be so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one server did with one set of requests."""

    figures: Mapping[str, float]
    output_tokens: int
    prompt_tokens: int


def run_compare(args: argparse.Namespace) -> int:
    """Sends everything and reports the ratios of the first server to the second."""
    targets = _targets(args)
    report = Report(
        bench="compare", settings=settings_of(args), output=args.output, is_kept=args.keep
    )
    rng = random.Random(args.workload_seed)
    rounds: dict[str, list[Round]] = {name: [] for name in NAMES}
    with progress("compare", 2 * (args.rounds + 1) * args.num_prompts) as done:
        for index in range(-1, args.rounds):
            shots = _shots(args, rng)
            order = NAMES if index % 2 == 0 else NAMES[::-1]
            for name in order:
                load = Load(target=targets[name], shots=shots, num_streams=args.concurrency)
                results, start = run_clients([load], done)
                served = _all_served(args.url[NAMES.index(name)], results[0].served)
                if index >= 0:  # the first round warms both up
                    rounds[name].append(_round(served, start))
    figures = compared(rounds)
    report.add(f"{args.url[0]} over {args.url[1]}", figures, show=_show)
    _warn(rounds)
    return 0


def _targets(args: argparse.Namespace) -> dict[str, Target]:
    """Returns where each server's requests go. Raises ConfigError for options that do not fit."""
    import httpx

    if len(args.url) != 2:
        raise ConfigError(f"two --url are compared, not {len(args.url)}", field="url")
    targets: dict[str, Target] = {}
    keys = _each("api_key", args.api_key)
    models = _each("served_model", args.served_model)
    for name, url, key, model in zip(NAMES, args.url, keys, models, strict=True):
        options = client_options(url, key)
        with httpx.Client(**options) as client:
            model = model or first_model(client)
        body: dict[str, Any] = {
            "model": model,
            "temperature": args.temperature,
            "seed": args.workload_seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if args.ignore_eos:
            body["ignore_eos"] = True
        route = options["base_url"] + "/v1/completions"
        targets[name] = Target(url=route, api_key=key, body=body)
    return targets


def _each(field: str, values: Sequence[str]) -> list[str | None]:
    if len(values) > 2:
        option = f"--{field.replace('_', '-')}"
        raise ConfigError(f"{option} is given {len(values)} times; give it twice", field=field)
    return [None, None] if not values else [values[0], values[-1]]


def _shots(args: argparse.Namespace, rng: random.Random) -> list[Shot]:
    """Returns requests of random words, which no server has seen: as text, since token ids mean
    different things to different models."""
    letters = string.ascii_lowercase
    shots: list[Shot] = []
    for _ in range(args.num_prompts):
        num_words = max(round(args.input_len.draw(rng) / TOKENS_OF_WORD), 1)
        words = ["".join(rng.choices(letters, k=WORD_LETTERS)) for _ in range(num_words)]
        shots.append(Shot(prompt=" ".join(words), max_tokens=args.output_len.draw(rng)))
    return shots


def _all_served(url: str, served: list[Served]) -> list[Served]:
    """Returns them, if none failed: rounds that lack requests do not compare."""
    failed = [one.error for one in served if one.error is not None]
    if failed:
        raise OctavoError(f"{url}: {len(failed)} requests failed; the first one: {failed[0]}")
    return served


def _round(served: list[Served], start: float) -> Round:
    # A server that tells no usage is taken to send a token an event.
    tokens = [one.num_output_tokens or len(one.token_times) for one in served]
    seconds = max(one.finished for one in served) - start
    tpots = [
        (one.finished - one.token_times[0]) / (made - 1)
        for one, made in zip(served, tokens, strict=True)
        if made > 1
    ]
    figures = {
        "output_tokens_per_second": sum(tokens) / seconds,
        "requests_per_second": len(served) / seconds,
        "ttft_p50_ms": 1e3 * statistics.median(one.ttft for one in served),
        "e2e_p50_ms": 1e3 * statistics.median(one.finished - one.started for one in served),
    }
    if tpots:
        figures["tpot_p50_ms"] = 1e3 * statistics.median(tpots)
    return Round(
        figures=figures,
        output_tokens=sum(tokens),
        prompt_tokens=sum(one.num_prompt_tokens for one in served),
    )


def compared(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Value]:
    """Returns each figure of both servers (medians of the rounds), the median ratio of the first to
    the second, and the lowest and highest one."""
    told: dict[str, Value] = {"rounds": len(rounds["a"])}
    for name in FIGURES:
        pairs = [
            (one.figures[name], other.figures[name])
            for one, other in zip(rounds["a"], rounds["b"], strict=True)
            if name in one.figures and name in other.figures
        ]
        if not pairs:
            continue
        ratios = [one / other for one, other in pairs]
        for index, server in enumerate(NAMES):
            told[f"{name}_{server}"] = statistics.median(pair[index] for pair in pairs)
        told[f"{name}_ratio"] = statistics.median(ratios)
        told[f"{name}_ratio_low"] = min(ratios)
        told[f"{name}_ratio_high"] = max(ratios)
        told[f"{name}_ratios"] = ratios
    for server in NAMES:
        told[f"output_tokens_{server}"] = sum(one.output_tokens for one in rounds[server])
        told[f"prompt_tokens_{server}"] = sum(one.prompt_tokens for one in rounds[server])
    return told


def _show(title: str, figures: Mapping[str, Value]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("", "A", "B", "A / B", "of rounds"):
        table.add_column(column, justify="right" if column else "left")
    for name in (one for one in FIGURES if f"{one}_ratio" in figures):
        low, high = figures[f"{name}_ratio_low"], figures[f"{name}_ratio_high"]
        table.add_row(
            f"{name} ({'higher' if name in HIGHER_IS_BETTER else 'lower'} is better)",
            f"{figures[f'{name}_a']:,.2f}",
            f"{figures[f'{name}_b']:,.2f}",
            f"{figures[f'{name}_ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console(stderr=True).print(table)


def _warn(rounds: Mapping[str, Sequence[Round]]) -> None:
    """Says what makes the figures other than they seem."""
    made = sorted(sum(one.output_tokens for one in rounds[name]) for name in NAMES)
    if made[1] > UNEQUAL * made[0]:
        say(
            f"note: one server made {made[1]:,} tokens, the other {made[0]:,}: their answers are "
            "not equally long; --ignore-eos makes them so where both know it"
        )
