"""What `octavo bench` measured, read back from its JSON lines: seconds a token, by kind of step.

Called by the plan's costs. Takes lines of one model and one machine; never measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.config import EngineConfig
from octavo.errors import ConfigError

Kind = Literal["prefill", "decode"]

SETTINGS = ("dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size")
"""Options that a rate depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One rate. `size` is the batch of decodes, or the length of the prompt."""

    kind: Kind
    size: int
    token_seconds: float
    share_of_floor: float | None
    """Floor over measured time, where the line knows the floor."""
    settings: Mapping[str, str]
    name: str
    """What a person calls it, like "D32"."""


def settings_key(config: EngineConfig) -> dict[str, str]:
    """Returns the options that a rate depends on, as lines have them."""
    values = {name: getattr(config, name) for name in SETTINGS}
    return {name: str(value) for name, value in values.items() if value is not None}


def read_measurements(paths: Sequence[Path], model: str, machine: str) -> list[Measurement]:
    """Returns the rates of `model` on `machine` (`machine_of` a line), the newest last.

    Raises ConfigError for a file that cannot be read or holds other things than such lines.
    """
    found: list[Measurement] = []
    for path in paths:
        for line in _lines(path):
            if _is_of(line, model) and machine_of(line) == machine:
                found += _rates(line)
    return found


def nearest(found: Iterable[Measurement], kind: Kind, size: int) -> Measurement | None:
    """Returns the newest measurement of a kind whose size is nearest by ratio."""
    ones = [one for one in found if one.kind == kind]
    return min(reversed(ones), key=lambda one: abs(math.log(one.size / size)), default=None)


def machine_of(line: Mapping[str, Any]) -> str:
    """Returns the name of the card that computed, or the processor with its cores."""
    device = line["device"]
    if device["computes_on"] != "cpu":
        return str(device["computes_on"])
    return f"{device['name']}, {device['cores']} cores"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="measured") from error
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            machine_of(line)
            _ = line["bench"], line["settings"]["model"], line["figures"], line["name"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}:{number} is no line of octavo bench; give a file of its --output"
            raise ConfigError(message, field="measured") from error
        yield line


def _is_of(line: Mapping[str, Any], model: str) -> bool:
    """Whether a line is of this model; names of shapes are those of models in small letters."""
    measured = str(line["settings"]["model"])
    return measured == model or measured == model.rstrip("/").rpartition("/")[2].lower()


def _rates(line: Mapping[str, Any]) -> Iterator[Measurement]:
    figures, given = line["figures"], line["settings"]
    if given.get("layers") or "error" in figures:  # a model that was cut
        return
    defaults = settings_key(EngineConfig(model="-"))
    settings = {name: str(given.get(name, defaults.get(name))) for name in SETTINGS}
    common: dict[str, Any] = {
        "share_of_floor": figures.get("share_of_floor"),
        "settings": {name: value for name, value in settings.items() if value != "None"},
        "name": line["name"],
    }
    if line["bench"] == "workloads" and line["name"] in ("D1", "D32"):
        batch, seconds = figures["batch"], figures["median"] / 1e3
        yield Measurement(kind="decode", size=batch, token_seconds=seconds / batch, **common)
    elif line["bench"] == "workloads" and line["name"].startswith("P "):
        length, rate = int(line["name"].split()[1]), figures["median"]
        yield Measurement(kind="prefill", size=length, token_seconds=1 / rate, **common)
    elif line["bench"] == "latency" and "tpot_p50_ms" in figures:
        batch, seconds = given["batch_size"], figures["tpot_p50_ms"] / 1e3
        length = int(str(given["input_len"]).rpartition(":")[2])
        rate = figures["prefill_tokens_per_second"]
        yield Measurement(kind="decode", size=batch, token_seconds=seconds / batch, **common)
        yield Measurement(kind="prefill", size=length, token_seconds=1 / rate, **common)
