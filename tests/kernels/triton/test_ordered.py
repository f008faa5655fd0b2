"""Columns whose groups are out of order (GPTQ's desc_act) stay packed: they are brought together
when they are loaded, and meet their columns of x."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.weights.placement import DevicePlacement
from octavo.weights.published.source import PackedSource
from octavo.weights.split import Split
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of, expected_experts
from tests.weights.packing import Written, gptq
from tests.weights.published_cases import named, opened

from octavo.kernels.triton.backend import TritonOps  # isort: skip
from octavo.kernels.triton.product.matrices import numbers_of  # isort: skip
from octavo.kernels.weights import ExpertBiases, ExpertWeights, Stack  # isort: skip

CONFIG = {"quant_method": "gptq", "bits": 4, "desc_act": True}
COUNT, HIDDEN, INNER = 3, 96, 64


def matrix(rows: int, cols: int, seed: int, order: Tensor | None = None) -> Written:
    """Returns a matrix whose columns are in groups out of order; `order`: in the groups of this."""
    made = gptq(np.random.default_rng(seed), rows, cols, 32, 4, less_one=True, reordered=True)
    if order is None:
        return made
    place, theirs = order.argsort(stable=True), made.tensors["g_idx"].argsort(stable=True)
    columns = torch.empty(cols, dtype=torch.long)
    columns[place] = theirs
    words = made.tensors["qweight"]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((words[:, None] >> shifts[:, None]) & 15).flatten(0, 1)[columns]
    packed = (codes.view(-1, 8, rows).long() << shifts.long()[:, None]).sum(1).to(torch.int32)
    tensors = made.tensors | {"qweight": packed, "g_idx": order.clone()}
    return Written(tensors, made.values[:, columns])


def source_of(folder: Path, matrices: dict[str, Written]) -> PackedSource:
    tensors = [named(one, name) for name, one in matrices.items()]
    return opened(folder, {k: v for some in tensors for k, v in some.items()}, CONFIG)


def make_ops(*, is_deterministic: bool = False) -> TritonOps:
    return TritonOps(1, is_deterministic=is_deterministic)


def test_products_gather_their_columns(tmp_path: Path):
    """Two of one order are one product, a third is another."""
    first = matrix(40, 128, 0)
    made = {
        "q": first,
        "k": matrix(24, 128, 1, first.tensors["g_idx"]),
        "v": matrix(24, 128, 2),
    }
    source = source_of(tmp_path, made)
    placement = DevicePlacement(source, torch.device(DEVICE))
    weights = placement.matrices({f"{name}.weight": None for name in made})
    placement.finish()
    values = torch.cat([one.values for one in made.values()]).double().to(DEVICE)
    for is_deterministic in (False, True):
        ops = make_ops(is_deterministic=is_deterministic)
        prepared = ops.prepare(weights)
        assert len(prepared.prepared) == 2  # type: ignore[attr-defined]
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        for some in (x[:1], x):
            assert error_of(ops.linear(some, prepared), some.double() @ values.T) < 2e-6
    numbers = torch.cat([numbers_of(weight) for weight in weights])
    assert error_of(numbers, values) < 4e-3  # they are bfloat16


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
def test_experts_have_orders_of_their_own(num_tokens: int, tmp_path: Path):
    made, shapes = {}, {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    for expert in range(COUNT):
        gate = matrix(INNER, HIDDEN, 10 * expert)
        made[f"{expert}.gate"] = gate
        made[f"{expert}.up"] = matrix(INNER, HIDDEN, 10 * expert + 1, gate.tensors["g_idx"])
        made[f"{expert}.down"] = matrix(HIDDEN, INNER, 10 * expert + 2)
    placement = DevicePlacement(source_of(tmp_path, made), torch.device(DEVICE))
    stacks = [
        placement.stack({f"{expert}.{part}.weight": None for expert in range(COUNT)})
        for part in shapes
    ]
    placement.finish()
    generator = torch.Generator().manual_seed(num_tokens)
    biases = ExpertBiases(
        gate_EF=torch.randn(COUNT, INNER, generator=generator).to(DEVICE),
        up_EF=torch.randn(COUNT, INNER, generator=generator).to(DEVICE),
        down_EM=torch.randn(COUNT, HIDDEN, generator=generator).to(DEVICE),
    )
    ops = make_ops()
    experts = ExpertWeights(gate=stacks[0], up=stacks[1], down=stacks[2], biases=biases)
    prepared = ops.prepare_experts(experts)
    x = (torch.randn(num_tokens, HIDDEN, generator=generator) * 0.3).to(DEVICE)
    chosen = [torch.randperm(COUNT, generator=generator)[:2] for _ in range(num_tokens)]
    ids = torch.stack(chosen).int().to(DEVICE)
    ids[-1, 0] = -1
    weights = torch.rand(num_tokens, 2, generator=generator).to(DEVICE)
    values = tuple(
        torch.stack([made[f"{expert}.{part}"].values for expert in range(COUNT)])
        .double()
        .to(DEVICE)
        for part in shapes
    )
    found = ops.moe(x, weights, ids, prepared, "silu")
    assert error_of(found, expected_experts(x, weights, ids, values, biases)) < 2e-6


def test_what_cannot_be_put_in_one_order_is_refused(tmp_path: Path):
    made = {name: matrix(INNER, HIDDEN, seed) for seed, name in enumerate(("gate", "up"))}
    made["down"] = matrix(HIDDEN, INNER, 2)
    source = source_of(tmp_path, made)
    placement = DevicePlacement(source, torch.device(DEVICE))
    gate, up, down = (placement.stack({f"{name}.weight": None}) for name in made)
    placement.finish()
    assert isinstance(gate, Stack)
    with pytest.raises(UnsupportedModelError, match=r"in another order .* --dtype bfloat16"):
        make_ops().prepare_experts(ExpertWeights(gate=gate, up=up, down=down))
    ranks = DevicePlacement(source, torch.device(DEVICE), 0, 2)
    rows = Split(axis="rows", unit="rows", num_units=INNER)
    (part,) = ranks.matrices({"gate.weight": rows})
    assert part.order is not None
    cols = Split(axis="cols", unit="columns", num_units=HIDDEN)
    with pytest.raises(ConfigError, match=r"groups are out of order .* use 1, or --dtype"):
        ranks.matrices({"gate.weight": cols})
