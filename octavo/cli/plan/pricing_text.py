"""How costs are shown: as text, or as JSON.

Called by `octavo plan --price`. Never computes one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from octavo.cli.plan.costs import Cost, Workload
from octavo.cli.plan.pricing import Priced, Pricing


def pricing_text(pricing: Pricing) -> str:
    """Returns a table of workloads, and one of what other options would change."""
    lines = [
        f"dollars for a million tokens, at ${pricing.price:g} an hour and GPU, always busy; input "
        "is what is computed of prompts:",
        f"  {'workload (tokens)':<46}{'at once':>8}{'ms/token':>10}{'input':>10}{'output':>10}"
        f"{'1,000 requests':>16}  from",
    ]
    for index, workload in enumerate(pricing.workloads):
        costs = (pricing.asked.floor[index], pricing.asked.known[index])
        shown = [cost for cost in costs if cost is not None]
        lines += [_cost_line(workload, cost) for cost in shown]
        if not shown:
            lines.append(f"  {workload!s:<46}{_why_none(pricing):>18}")
    lines += _sources(pricing)
    changed = [pricing.asked, *(one for one in pricing.changes.values() if one is not None)]
    if any(cost is not None for one in changed for cost in (*one.floor, *one.known)):
        lines += _changes(pricing)
    return "\n".join(lines)


def _cost_line(workload: Workload, cost: Cost) -> str:
    return (
        f"  {workload!s:<46}{cost.num_requests:>8,}{cost.token_ms:>10.2f}"
        f"{_dollars(cost.input_dollars):>10}{_dollars(cost.output_dollars):>10}"
        f"{_dollars(cost.thousand_dollars(workload)):>16}  {cost.source}"
    )


def _why_none(pricing: Pricing) -> str:
    return "does not fit" if pricing.has_ceilings or pricing.measured else "not measured"


def _sources(pricing: Pricing) -> Iterator[str]:
    if pricing.has_ceilings:
        yield f"  floor: what no engine can beat on {pricing.machine}"
    if pricing.measured:
        yield f"  measured on {pricing.machine}: {', '.join(dict.fromkeys(pricing.measured))}"
    else:
        yield (
            f"  nothing was measured on {pricing.machine} with these options: "
            "octavo bench workloads MODEL --only D1,D32,P --keep"
        )


def _changes(pricing: Pricing) -> Iterator[str]:
    names = [workload.name for workload in pricing.workloads]
    yield "what would change it (dollars for a million tokens, input / output):"
    yield f"  {'with':<30}{'GPUs':>5}" + "".join(f"{name:>18}" for name in names) + "  from"
    rows = {"as asked": pricing.asked, **pricing.changes}
    for option, priced in rows.items():
        if priced is None:
            yield f"  {option:<30} does not fit"
            continue
        for costs in (priced.floor, priced.known):
            shown = next((cost for cost in costs if cost is not None), None)
            if shown is not None:
                cells = "".join(f"{_pair(cost):>18}" for cost in costs)
                yield f"  {option:<30}{priced.num_devices:>5}{cells}  {shown.source}"
    known = [cost for one in rows.values() if one is not None for cost in one.known]
    if any(cost is not None and cost.source == "estimated" for cost in known):
        yield "  estimated: its floor, at the share of it that was measured as asked"


def _pair(cost: Cost | None) -> str:
    if cost is None:
        return "does not fit"
    return f"{_dollars(cost.input_dollars)} / {_dollars(cost.output_dollars)}"


def _dollars(value: float) -> str:
    """Three digits that count."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def pricing_json(pricing: Pricing) -> dict[str, Any]:
    """Returns the same as data."""
    workloads = pricing.workloads
    return {
        "dollars_an_hour": pricing.price,
        "machine": pricing.machine,
        "measured": list(pricing.measured),
        "workloads": [dataclasses.asdict(one) for one in workloads],
        "asked": _priced_json(workloads, pricing.asked),
        "changes": {
            option: "does not fit" if one is None else _priced_json(workloads, one)
            for option, one in pricing.changes.items()
        },
    }


def _priced_json(workloads: Any, priced: Priced) -> dict[str, Any]:
    def costs(of: Any) -> dict[str, Any]:
        return {
            workload.name: cost
            and dataclasses.asdict(cost)
            | {"thousand_requests_dollars": cost.thousand_dollars(workload)}
            for workload, cost in zip(workloads, of, strict=True)
        }

    return {
        "num_devices": priced.num_devices,
        "floor": costs(priced.floor),
        "known": costs(priced.known),
    }
