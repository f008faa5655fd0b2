"""Experts that a safetensors checkpoint has in stacks, listed one by one.

Called by `safetensors_source`. Never reads tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from octavo.weights.names import ExpertNames
from octavo.weights.source import ColumnsOf, StoredTensor

_STACK = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|feed_forward)\.experts\.(gate_up_proj|down_proj)(_bias)?"
)
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


def as_stacked(names: ExpertNames, tensors: Mapping[str, StoredTensor]) -> ExpertNames:
    """Returns the names with the layout that shapes of stacks show: trainers save those of any
    family transposed, and the other way round."""
    if names.layout == "alternating columns":
        return names
    for name, gate_up in tensors.items():
        stack = _STACK.fullmatch(name)
        down = tensors.get(name.replace("gate_up_proj", "down_proj"))
        if stack is None or stack[2] == "down_proj" or down is None:
            continue
        if len(gate_up.shape) == len(down.shape) == 3:
            (_, *shape), (_, hidden, inner) = gate_up.shape, down.shape
            if shape == [2 * inner, hidden]:
                return replace(names, layout="rows")
            if shape == [inner, 2 * hidden]:
                return replace(names, layout="columns")
    return names


def experts_of(
    name: str, stored: StoredTensor, names: ExpertNames
) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the experts of a stack under their usual names, or the tensor itself.

    Stacks are those of transformers 5 in memory order ([E, 2F, M] and [E, M, F]) and what
    `GateUpLayout` tells of; biases are [E, 2F] and [E, M].
    """
    if router := _ROUTER.fullmatch(name):
        yield names.router(router[1]), stored
        return
    stack = _STACK.fullmatch(name)
    is_bias = stack is not None and stack[3] is not None
    if stack is None or len(stored.shape) != 3 - is_bias or stored.format is None:
        yield name, stored
        return
    parts = ("down",) if stack[2] == "down_proj" else ("gate", "up")
    kind = "bias" if is_bias else "weight"
    for expert in range(stored.shape[0]):
        for part, one in zip(
            parts, _split(_expert(stored, expert), len(parts), names), strict=True
        ):
            yield names.expert(stack[1], expert, part, kind=kind), one


def _expert(stack: StoredTensor, index: int) -> StoredTensor:
    """Returns one expert's part of a stack: [rows, cols], or [length]."""
    one = replace(stack, shape=stack.shape[1:])
    return replace(one, start=stack.start + index * one.nbytes)


def _split(one: StoredTensor, count: int, names: ExpertNames) -> Iterator[StoredTensor]:
    """Yields the `count` matrices (or biases) that an expert's part of a stack is made of."""
    if names.layout == "rows":
        shape = (one.shape[0] // count, *one.shape[1:])
        for index in range(count):
            part = replace(one, shape=shape)
            yield replace(part, start=one.start + index * part.nbytes)
        return
    rows, cols = one.shape if len(one.shape) == 2 else (1, one.shape[0])
    width = cols // count
    is_alternating = names.layout == "alternating columns"
    for index in range(count):
        columns = ColumnsOf(
            rows=rows,
            cols=cols,
            first=index if is_alternating else index * width,
            step=count if is_alternating else 1,
        )
        yield replace(one, shape=(width, rows)[: len(one.shape)], columns=columns)
