"""`octavo plan --price`: what workloads cost on a plan, and on those that other options would make.

Called by `octavo plan`. Finds the machine's floors and measurements; `costs` has the arithmetic.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.bench.floors import CEILINGS, Ceilings, Floors
from octavo.cli.plan.costs import Cost, Known, Rates, Workload, floor_cost, known_cost
from octavo.cli.plan.measurements import Measurement, read_measurements, settings_key
from octavo.config import EngineConfig, bench_dir
from octavo.errors import CapacityError, ConfigError, UnsupportedModelError
from octavo.formats import kv_formats

if TYPE_CHECKING:
    from octavo.cli.plan.planner import Planner
    from octavo.kv_cache.planner import MemoryPlan

PLANNED_CARD = "NVIDIA H100 80GB HBM3"
"""Whose ceilings a card that is not here is given."""
TRIES: tuple[tuple[str, Any], ...] = (
    ("dtype", "bfloat16"),
    ("quantization", "fp8"),
    ("quantization", "int8"),
    ("quantization", "int4"),
    ("kv_cache_dtype", "fp8"),
    ("kv_cache_dtype", "int8"),
    ("kv_cache_dtype", "int4"),
    ("tensor_parallel_size", 2),
    ("tensor_parallel_size", 4),
    ("tensor_parallel_size", 8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """The costs of one set of options, by workload: at the floor, and by what was measured."""

    num_devices: int
    floor: Sequence[Cost | None]
    known: Sequence[Cost | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """All that `--price` tells."""

    price: float
    machine: str
    has_ceilings: bool
    workloads: Sequence[Workload]
    measured: Sequence[str]
    """Names of what was measured with the options asked for."""
    asked: Priced
    changes: Mapping[str, Priced | None]
    """By option; None does not fit."""


def price_plans(
    planner: Planner,
    config: EngineConfig,
    plan: MemoryPlan,
    *,
    price: float,
    workloads: Sequence[Workload],
    machine: str,
    measured: Sequence[str],
) -> Pricing:
    """Returns the costs of `plan`, which `config` asks for, and of those of other options.

    `measured` are files of `octavo bench`; without any, those that it kept are read. Raises
    ConfigError for a file that is none, and for given ones that do not tell of this model and
    machine.
    """
    paths = [Path(one) for one in measured] or _kept()
    found = read_measurements(paths, config.model, machine)
    if measured and not found:
        raise ConfigError(
            f"no line of {', '.join(measured)} is of {config.model} on {machine}; measure it with "
            f"octavo bench workloads {config.model} --output FILE, or leave --measured out",
            field="measured",
        )
    mine = _same(found, config)
    ceilings = CEILINGS.get(machine)

    def priced(changed: EngineConfig, its_plan: MemoryPlan) -> Priced:
        known = Known(same=_same(found, changed), other=mine)
        rates = _rates(planner, changed, its_plan, ceilings)
        return Priced(
            num_devices=rates.num_devices,
            floor=[floor_cost(one, rates, price) for one in workloads],
            known=[known_cost(one, rates, price, known) for one in workloads],
        )

    changes: dict[str, Priced | None] = {}
    for field, value in TRIES:
        if getattr(config, field) == value:
            continue
        changed = dataclasses.replace(config, **{field: value})
        try:
            other = planner.plan(changed)
        except CapacityError:
            changes[_option(field, value)] = None
            continue
        except (ConfigError, UnsupportedModelError):  # the model or the device is not for it
            continue
        if other != plan:
            changes[_option(field, value)] = priced(changed, other)
    return Pricing(
        price=price,
        machine=machine,
        has_ceilings=ceilings is not None,
        workloads=workloads,
        measured=[_measured_name(one) for one in mine],
        asked=priced(config, plan),
        changes=changes,
    )


def machine_name(device: str, size: int | None) -> str:
    """Returns the name of what is planned for, as lines of `octavo bench` have it: a card of
    `size` bytes need not be here."""
    if device != "cpu" and size is not None:
        return PLANNED_CARD
    if device != "cpu":
        from octavo.cli.bench.device_profile import card_name

        return card_name(device)
    from octavo.cli.bench.report import device as this_machine

    here = this_machine()
    return f"{here['name']}, {here['cores']} cores"


def _rates(
    planner: Planner, config: EngineConfig, plan: MemoryPlan, ceilings: Ceilings | None
) -> Rates:
    spec = planner.spec
    weights = sum(planner.parts(config).values())
    floors = Floors(
        spec,
        element_bytes=weights / spec.num_parameters,
        kv=kv_formats(plan.groups[0].spec.formats),
    )
    return Rates(
        plan=plan, floors=floors, ceilings=ceilings, num_devices=config.tensor_parallel_size
    )


def _kept() -> list[Path]:
    return [Path(one) for one in sorted(glob.glob(os.path.join(bench_dir(), "*.jsonl")))]


def _same(found: Sequence[Measurement], config: EngineConfig) -> list[Measurement]:
    return [one for one in found if one.settings == settings_key(config)]


def _measured_name(one: Measurement) -> str:
    share = f", {one.share_of_floor:.0%} of its floor" if one.share_of_floor else ""
    return f"{one.name} ({one.kind}{share})"


def _option(field: str, value: object) -> str:
    return f"--{field.replace('_', '-')} {value}"
