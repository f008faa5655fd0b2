"""The rule of octavo/kernels/triton/launching/overlap.py, read off the kernels' sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import octavo.kernels.triton

READ_EARLY = {
    *("weight_M", "weight_tile(w_at", "weight_tile(down_at", "w = tl.load(w_at"),
    "of_weight = gl.load(scales",
}
"""Weights and their scales, which no kernel writes."""
WRITTEN_BEFORE = {
    "pairs.down_and_combine_kernel": {"ids_P", "weights_P", "shared_gate"},
    "packed_pairs.down_and_combine_packed_kernel": {"ids_P", "weights_P"},
}
"""What kernels before the last one wrote: here the router, before gate and up."""
TOUCHING = ("tl.load", "tl.store", "tl.atomic", "gl.load", "gl.store", "gl.atomic", "_tile(")
WAITS = ("wait_turn(OVERLAP)", "if OVERLAP:\n    gdc_wait()")
"""The latter in Gluon, which cannot call Triton's functions."""


def _kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every jitted function that is launched, or called by one, with OVERLAP."""
    for path in sorted(Path(octavo.kernels.triton.__path__[0]).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            is_overlapping = isinstance(node, ast.FunctionDef) and any(
                argument.arg == "OVERLAP" for argument in node.args.args
            )
            names = ("wait_turn", "announce")
            if isinstance(node, ast.FunctionDef) and is_overlapping and node.name not in names:
                yield f"{path.stem}.{node.name}", node


@cache
def _names() -> set[str]:
    return {node.name for _, node in _kernels()}


def _leaves_it_to_another(text: str) -> bool:
    """Whether a statement hands OVERLAP on to functions that wait, and are seen here themselves:
    parts of a kernel, or what the warps of one do (`gl.warp_specialize`)."""
    called = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    return "OVERLAP" in called and bool(called & _names())


@pytest.mark.parametrize("kernel", [pytest.param(node, id=name) for name, node in _kernels()])
def test_a_kernel_waits_before_it_touches_memory_announces_or_leaves(
    kernel: ast.FunctionDef, request: pytest.FixtureRequest
) -> None:
    is_early = READ_EARLY | WRITTEN_BEFORE.get(request.node.callspec.id, set())
    for statement in kernel.body:
        text = ast.unparse(statement)
        if text in WAITS or _leaves_it_to_another(text):
            return
        assert "return" not in text, "a program leaves before its turn"
        assert "announce" not in text
        assert "tl.store" not in text
        if not any(name in text for name in is_early):
            assert not any(word in text for word in TOUCHING), text
    pytest.fail("the kernel never waits: call wait_turn(OVERLAP)")


def test_every_overlapping_kernel_is_seen() -> None:
    assert len(list(_kernels())) >= 15
