"""Dollars for a million tokens: a GPU's hour over the tokens that it makes in one.

Called by `octavo plan --price`. Rates come from floors (`bench.floors`), from what was measured, or
from floors at the share of them that was measured. Full load is assumed, and prompts and outputs
are counted apart: the sum is what a request costs when neither rides on the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.cli.plan.measurements import Measurement, nearest

if TYPE_CHECKING:
    from octavo.cli.bench.floors import Ceilings, Floors
    from octavo.kv_cache.planner import MemoryPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of request, in tokens; `cached` of the prompt are found in the prefix cache."""

    name: str
    prompt: int
    cached: int = 0
    output: int

    @property
    def fresh(self) -> int:
        """Tokens of the prompt that are computed."""
        return self.prompt - self.cached

    @property
    def length(self) -> int:
        return self.prompt + self.output

    def __str__(self) -> str:
        cached = f" ({self.cached:,} cached)" if self.cached else ""
        return f"{self.name}: {self.prompt:,}{cached} in, {self.output:,} out"


WORKLOADS = (
    Workload(name="chat", prompt=1000, output=300),
    Workload(name="agent", prompt=32000, cached=30000, output=400),
    Workload(name="documents", prompt=8000, output=300),
    Workload(name="reasoning", prompt=500, output=4000),
)


def parse_workloads(text: str) -> tuple[Workload, ...]:
    """Returns workloads from "1000:300,32000:30000:400" (prompt, cached, output)."""
    found: list[Workload] = []
    for part in text.split(","):
        numbers = [int(one) if one.isdigit() else 0 for one in part.strip().split(":")]
        if len(numbers) == 2:
            numbers.insert(1, 0)
        prompt, cached, output = numbers if len(numbers) == 3 else (0, 0, 0)
        if not (prompt > cached >= 0 and output > 0):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no workload; write PROMPT:OUTPUT or PROMPT:CACHED:OUTPUT in tokens, "
                "like 1000:300 or 32000:30000:400, of which fewer are cached than asked"
            )
        found.append(Workload(name=part.strip(), prompt=prompt, cached=cached, output=output))
    return tuple(found)


def parse_price(text: str) -> float:
    """Returns dollars an hour and GPU."""
    try:
        price = float(text)
    except ValueError:
        price = 0.0
    if not 0 < price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price; write dollars an hour, like 3.0")
    return price


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a workload costs on one plan."""

    num_requests: int
    """Side by side."""
    input_dollars: float
    """A million prompt tokens that are computed."""
    output_dollars: float
    """A million output tokens."""
    token_ms: float
    """Between two tokens of a request."""
    source: str
    """Where the rates come from: the floor, or what was measured."""

    def thousand_dollars(self, workload: Workload) -> float:
        """Returns what 1,000 requests cost."""
        a_million = workload.fresh * self.input_dollars + workload.output * self.output_dollars
        return a_million / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How long a plan's steps take: on `num_devices` devices, which share them evenly (what they
    tell each other is not counted)."""

    plan: MemoryPlan
    floors: Floors
    ceilings: Ceilings | None
    num_devices: int

    def decode(self, workload: Workload, num_requests: int) -> float | None:
        """Returns seconds a token at the floor, of `num_requests` in the middle of their output."""
        middle = workload.prompt + workload.output // 2
        step = self._seconds([(1, middle)] * num_requests)
        return None if step is None else step / num_requests

    def prefill(self, workload: Workload, num_requests: int) -> float | None:
        """Returns seconds a computed prompt token at the floor, in steps as full as may be."""
        room = self.plan.max_num_batched_tokens
        fresh = workload.fresh
        if fresh <= room:
            together = min(room // fresh, num_requests)
            step = self._seconds([(fresh, workload.cached)] * together)
            return None if step is None else step / (together * fresh)
        starts = range(0, fresh, room)
        steps = [self._seconds([(min(room, fresh - at), workload.cached + at)]) for at in starts]
        return None if None in steps else sum(one or 0.0 for one in steps) / fresh

    def _seconds(self, sequences: Sequence[tuple[int, int]]) -> float | None:
        if self.ceilings is None:
            return None
        return self.floors.step(sequences).seconds(self.ceilings) / self.num_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What was measured: with these very options, and with those that the plan was asked for."""

    same: Sequence[Measurement] = ()
    other: Sequence[Measurement] = ()


def floor_cost(workload: Workload, rates: Rates, price: float) -> Cost | None:
    """Returns the least that a workload can cost; None if it does not fit or no floor is known."""
    return _cost(workload, rates, price, Known(), "floor")


def known_cost(workload: Workload, rates: Rates, price: float, known: Known) -> Cost | None:
    """Returns what a workload costs by what was measured; None if that says nothing of it."""
    if known.same:
        return _cost(workload, rates, price, known, "measured")
    return _cost(workload, rates, price, known, "estimated") if known.other else None


def _cost(workload: Workload, rates: Rates, price: float, known: Known, source: str) -> Cost | None:
    if workload.length > rates.plan.max_model_len:
        return None
    count = rates.plan.num_requests(workload.length)
    if not count:
        return None
    prefill, decode = rates.prefill(workload, count), rates.decode(workload, count)
    if source != "floor":
        ones, is_same = known.same or known.other, bool(known.same)
        batch = nearest(ones, "decode", count)
        prefill = _scaled(prefill, nearest(ones, "prefill", workload.fresh), is_same)
        if decode is None and batch is not None:  # nothing says what other batches would take
            count = batch.size
        decode = _scaled(decode, batch, is_same)
    if prefill is None or decode is None:
        return None
    a_second = price * rates.num_devices / 3600
    return Cost(
        num_requests=count,
        input_dollars=1e6 * prefill * a_second,
        output_dollars=1e6 * decode * a_second,
        token_ms=1e3 * decode * count,
        source=source,
    )


def _scaled(floor: float | None, measured: Measurement | None, is_same: bool) -> float | None:
    """Returns the floor at the share of it that was reached; without a floor the measured seconds
    themselves, which hold for the options that were measured alone."""
    if measured is None:
        return None
    if floor is not None and measured.share_of_floor:
        return floor / measured.share_of_floor
    return measured.token_seconds if is_same else None
