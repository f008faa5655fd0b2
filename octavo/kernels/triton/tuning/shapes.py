"""Which launch shape a product or a MoE layer gets: what `octavo tune` measured, else a heuristic.

Asked by `backend.py` before a launch, filled from one file per GPU and Triton by the registry.
Never measures (`tune.py` does), and never asks for a file: without one the heuristics decide.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor

from octavo.folders import CACHE_WAY_OUT, writing
from octavo.kernels.triton.experts.shapes import (
    ExpertsShape,
    PairsShape,
    experts_shape,
    packed_experts_shape,
    pairs_shape,
)
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.chip import can_describe, is_hopper, next_power_of_2
from octavo.kernels.triton.product.shapes import (
    ProductShape,
    RowsShape,
    product_shape,
    rows_shape,
)

logger = logging.getLogger(__name__)

Shape = ExpertsShape | PairsShape | ProductShape | RowsShape
KINDS = {"moe": ExpertsShape, "pairs": PairsShape, "product": ProductShape, "rows": RowsShape}
Key = tuple[str | int, ...]
"""Kind, dtype, tokens and sizes. The tokens are the power of two at or above their number."""
VERSION = 4
"""Raise it when a kernel changes so that what was measured before is worth nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The launch shapes of one device."""

    tuned: Mapping[Key, Shape] = field(default_factory=dict)

    def product(self, x_TM: Tensor, weight_NM: Tensor) -> ProductShape:
        found = self._find("product", x_TM, weight_NM, *weight_NM.shape)
        if found is not None:
            return found
        shape = product_shape(len(x_TM), len(weight_NM), can_tma=_can_tma(x_TM, weight_NM))
        return shape if _is_short(x_TM) else shape.of_floats()

    def rows(self, x_TM: Tensor, weight_NM: Tensor) -> RowsShape:
        found = self._find("rows", x_TM, weight_NM, *weight_NM.shape)
        return rows_shape(*weight_NM.shape) if found is None else found

    def experts(self, x_TM: Tensor, top_k: int, experts: StackedExperts) -> ExpertsShape:
        count, inner_size = experts.count, experts.inner_size
        hidden_size = experts.hidden_size
        if experts.is_packed:
            layouts = experts.gate_layout, experts.down_layout
            return packed_experts_shape(len(x_TM), top_k, count, *layouts)
        found = self._find("moe", x_TM, experts.gate_EFM, top_k, count, inner_size, hidden_size)
        if found is not None:
            return found
        can_tma = _can_tma(x_TM, experts.gate_EFM) and can_describe(experts.down_EMF)
        shape = experts_shape(len(x_TM), top_k, count, inner_size, can_tma=can_tma)
        return shape if _is_short(x_TM) else shape.of_floats()

    def pairs(self, x_TM: Tensor, top_k: int, experts: StackedExperts) -> PairsShape:
        count, inner_size = experts.count, experts.inner_size
        hidden_size = experts.hidden_size
        found = self._find("pairs", x_TM, experts.gate_EFM, top_k, count, inner_size, hidden_size)
        return pairs_shape(hidden_size, inner_size, top_k) if found is None else found

    def _find(self, kind: str, x: Tensor, weight: Tensor, *sizes: int) -> Shape | None:
        if not self.tuned or x.dtype != weight.dtype:
            return None
        return self.tuned.get(key_of(kind, x.dtype, len(x), *sizes))


def key_of(kind: str, dtype: torch.dtype, num_tokens: int, *sizes: int) -> Key:
    """Returns the key; `sizes` are rows and columns, or top_k, experts, inner and hidden size."""
    return (kind, str(dtype), next_power_of_2(num_tokens), *sizes)


def shapes_path(folder: Path, device: torch.device) -> Path:
    """Returns the file of what was measured on a device like this one."""
    card = device.type
    if card != "cpu":
        card = torch.get_device_module(device).get_device_name(device)
    name = f"{card}_triton-{triton.__version__}_shapes-{VERSION}"
    return folder / (re.sub(r"[^\w.-]+", "-", name) + ".json")


def read_shapes(path: Path) -> Shapes:
    """Returns the shapes of a file; what is missing, broken or of another kind is left out."""
    tuned: dict[Key, Shape] = {}
    for text, value in _read(path).items():
        try:
            kind, dtype, *sizes = text.split()
            shape = msgspec.convert(value, KINDS[kind])
            _check(dataclasses.asdict(shape))
            tuned[(kind, dtype, *map(int, sizes))] = shape
        except (ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
            logger.debug("%s: %r is ignored: %s", path, text, error)
    if tuned:
        logger.info("%d launch shapes were tuned: %s", len(tuned), path)
    return Shapes(tuned=tuned)


def save_shape(path: Path, key: Key, shape: Shape | None) -> None:
    """Adds a shape to the file, or takes out the key's; all others stay as they are."""
    entries, text = _read(path), " ".join(map(str, key))
    entries.pop(text, None)
    if shape is not None:
        entries[text] = dataclasses.asdict(shape)
    with writing(path.parent, CACHE_WAY_OUT):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(entries, file, indent=1)
        os.replace(file.name, path)


def _read(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        logger.debug("%s is ignored: %s", path, error)
        return {}


def _check(numbers: Mapping[str, Any]) -> None:
    """Raises ValueError unless all sizes are powers of two: Triton would fail at the first step."""
    for name, number in numbers.items():
        if isinstance(number, dict):
            _check(number)
        elif not isinstance(number, bool):
            is_power = number & (number - 1) == 0 or name == "num_stages"
            if number < 1 or not is_power:
                raise ValueError(f"{name} is {number}")


def _can_tma(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and is_hopper(x.device) and can_describe(weight)


def _is_short(x: Tensor) -> bool:
    """Whether numbers have 16 bits, for which the heuristics are made."""
    return x.element_size() <= 2
