"""How much of the time the device computes, and with what: torch's profiler over real steps.

Used by `octavo bench workloads` for K, which needs a CUDA device. Never runs beside another
measurement.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from octavo.cli.bench.report import Value
from octavo.engine.core import EngineCore
from octavo.request import Request, SamplingParams, pack_ids

SHOWN_KERNELS = 15
LEAD_TOKENS = 4
"""Tokens that every sequence has before decoding is measured."""


class Activity(NamedTuple):
    """One kernel or copy on the device; microseconds of one clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What the device did between its first and its last activity."""

    span_seconds: float
    busy_seconds: float
    """While at least one activity ran."""
    kernels: Sequence[tuple[str, float, int]]
    """Name, seconds in sum and count, longest first."""

    def figures(self, wall: float, steps: int) -> dict[str, Value]:
        """Returns what is reported of `steps` steps, which took `wall` without the profiler."""
        return {
            "unit": "share",
            "busy_share": self.busy_seconds / max(self.span_seconds, 1e-9),
            "busy_share_of_plain_wall": self.busy_seconds / wall,
            "steps": steps,
            "plain_wall_ms_per_step": 1e3 * wall / steps,
            "profiled_ms_per_step": 1e3 * self.span_seconds / steps,
            "busy_ms_per_step": 1e3 * self.busy_seconds / steps,
            "kernels": [
                {"name": kernel[:110], "ms": 1e3 * seconds, "count": count}
                for kernel, seconds, count in self.kernels[:SHOWN_KERNELS]
            ],
        }


def card_name(device: str) -> str:
    """Returns the name of the card that torch calls `device`, as in `floors.CEILINGS`."""
    if device == "cpu":
        return device
    return torch.get_device_module(device).get_device_name(device)


Record = Callable[[Callable[[], object]], DeviceProfile]


def record(run: Callable[[], object]) -> DeviceProfile:
    """Returns what the device did while `run` ran, and until all that it launched was done."""
    device_type = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    return summarize(
        [
            Activity(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == device_type
        ]
    )


def summarize(activities: Sequence[Activity]) -> DeviceProfile:
    """Returns span, union and sums by name of activities that may overlap."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    busy, first, reached = 0.0, None, 0.0
    for name, start, end in sorted(activities, key=lambda activity: activity.start):
        if first is None:
            first = reached = start
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
        times[name].append(end - start)
    kernels = [(name, sum(spent) / 1e6, len(spent)) for name, spent in times.items()]
    return DeviceProfile(
        span_seconds=(reached - (first or 0.0)) / 1e6,
        busy_seconds=busy / 1e6,
        kernels=sorted(kernels, key=lambda kernel: -kernel[1]),
    )


def profile_decode(
    core: EngineCore, prompts: Sequence[Sequence[int]], num_steps: int, record: Record = record
) -> tuple[float, DeviceProfile]:
    """Returns seconds of `num_steps` decode steps of all prompts, and a profile of as many more.

    The seconds are taken without the profiler, which slows launches down.
    """
    params = SamplingParams(temperature=1.0, max_tokens=None, ignore_eos=True, detokenize=False)
    made = {f"profile-{index}": 0 for index in range(len(prompts))}
    for name, ids in zip(made, prompts, strict=True):
        core.add(Request(request_id=name, packed_prompt=pack_ids(ids), params=params))

    def steps() -> None:
        for _ in range(num_steps):
            core.step()

    try:
        while min(made.values()) < LEAD_TOKENS:
            for delta in core.step():
                made[delta.request_id] += len(delta.token_ids)
        began = time.perf_counter()
        steps()
        seconds = time.perf_counter() - began
        record(core.step)  # the profiler's own start is slow
        return seconds, record(steps)
    finally:
        for name in made:
            core.abort(name)
        while core.has_work:
            core.step()
