"""Blocks that point into grids mean on a GPU what the package gguf says, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from octavo.formats import GGUF_FORMATS
from octavo.kernels.cells import KEPT_BLOCKS
from octavo.kernels.dequantize import gguf_table
from octavo.kernels.planes import values_of
from octavo.planes import PLANE_LAYOUTS
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import error_of, expected_experts, planes

from octavo.kernels.triton.backend import TritonOps  # isort: skip
from octavo.kernels.triton.product.grids import unpack_blocks  # isort: skip
from octavo.kernels.weights import ExpertBiases, ExpertWeights, Stack, Weight  # isort: skip


def random_rows(name: str, rows: int, cols: int, seed: int = 0) -> tuple[Weight, Tensor]:
    """Returns blocks of random bytes, some of whose scales are no numbers, and their values."""
    form, rng = GGUF_FORMATS[name], np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, form.row_bytes(cols)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = dequantize(data, GGMLQuantizationType[name.upper()])
    return blocks_of(name, data, cols), torch.from_numpy(values.astype(np.float32)).to(DEVICE)


def blocks_of(name: str, data: np.ndarray, cols: int) -> Weight:
    form = GGUF_FORMATS[name]
    table = gguf_table(form)
    return Weight(
        data=torch.from_numpy(data).to(DEVICE),
        format=form,
        rows=len(data),
        cols=cols,
        table=None if table is None else table.to(DEVICE),
    )


def same_bits(found: Tensor, expected: Tensor) -> bool:
    is_none = expected.isnan()
    return torch.equal(found.isnan(), is_none) and torch.equal(
        found.masked_fill(is_none, 0), expected.masked_fill(is_none, 0)
    )


@pytest.mark.parametrize("name", KEPT_BLOCKS)
def test_values_are_those_of_the_format(name: str):
    weight, values = random_rows(name, 6, 512)
    assert same_bits(unpack_blocks(weight, torch.float32), values)
    ids = torch.tensor([2, -1, 3, 0], dtype=torch.int32, device=DEVICE)
    found = unpack_blocks(weight, torch.float32, ids, rows_each=2)
    expected = torch.full((8, 512), float("nan"), device=DEVICE)
    expected[:2], expected[6:] = values[4:6], values[:2]
    assert same_bits(found, expected)


def plain_rows(name: str, rows: int, cols: int, seed: int) -> tuple[Weight, Tensor]:
    """As `random_rows`, with scales near one in a thousand."""
    form, rng = GGUF_FORMATS[name], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, cols // 256, form.block_bytes), dtype=np.uint8)
    at = {"tq1_0": 52, "tq2_0": 64}.get(name, 0)
    scales = rng.uniform(5e-4, 2e-3, blocks.shape[:2]).astype(np.float16)
    blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    data = blocks.reshape(rows, -1)
    values = dequantize(data, GGMLQuantizationType[name.upper()]).astype(np.float32)
    return blocks_of(name, data, cols), torch.from_numpy(values).to(DEVICE)


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_products_and_rows_are_those_of_the_values(is_deterministic: bool):
    ops = TritonOps(1, is_deterministic=is_deterministic)
    made = [plain_rows(name, 24, 256, seed) for seed, name in enumerate(("iq2_xs", "iq3_s"))]
    weights = ops.prepare([weight for weight, _ in made])
    values = torch.cat([one for _, one in made]).double()
    bias = torch.linspace(-1, 1, 48, device=DEVICE)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for some in (x[:1], x):
        found = ops.linear(some, weights, bias)
        assert error_of(found, some.double() @ values.T + bias) < 2e-6
    ids = torch.tensor([3, 23], dtype=torch.int32, device=DEVICE)
    # Triton's interpreter cuts bfloat16 off.
    assert error_of(ops.embedding(ids, weights[0]), made[0][1][[3, 23]]) < 5e-3
    logits = ops.logits(x, weights[1])
    assert error_of(logits, x.double() @ made[1][1].double().T) < 2e-6


def in_planes(name: str, rows: int, cols: int, seed: int) -> tuple[Weight, Tensor]:
    layout = PLANE_LAYOUTS[name]
    made = planes(layout, rows, cols, seed)
    weight = Weight(
        data=made.codes,
        format=GGUF_FORMATS[name],
        rows=rows,
        cols=cols,
        planes=made,
        layout=layout,
    )
    return weight, values_of(layout, made, cols)


@pytest.mark.parametrize(
    ("gate", "down", "num_tokens"),
    [
        *(("iq2_xxs", "q8_0", 1), ("iq2_xxs", "q8_0", 5), ("iq2_xxs", "q8_0", 70)),
        *(("q8_0", "iq3_s", 1), ("q8_0", "iq3_s", 5), ("q8_0", "iq3_s", 70)),
    ],
)
def test_experts_are_unpacked_alone_or_in_parts(gate: str, down: str, num_tokens: int):
    """One of both products in blocks, the other in planes, with biases; one id is another's. Few
    pairs have those of their experts made numbers, many gate and up of half of the experts."""
    count = 3
    hidden, inner = (256, 32) if gate in KEPT_BLOCKS else (32, 256)
    make = {True: plain_rows, False: in_planes}
    of_gate, of_down = make[gate in KEPT_BLOCKS], make[down in KEPT_BLOCKS]
    made = [of_gate(gate, count * inner, hidden, seed) for seed in (1, 2)]
    made.append(of_down(down, count * hidden, inner, 3))
    generator = torch.Generator().manual_seed(num_tokens)

    def some(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE)

    biases = ExpertBiases(
        gate_EF=some(count, inner), up_EF=some(count, inner), down_EM=some(count, hidden)
    )
    stacks = [Stack(whole=one, num_matrices=count) for one, _ in made]
    ops = TritonOps(1, is_deterministic=False)
    experts = ops.prepare_experts(
        ExpertWeights(gate=stacks[0], up=stacks[1], down=stacks[2], biases=biases)
    )
    x, weights = some(num_tokens, hidden), some(num_tokens, 2).abs()
    chosen = [torch.randperm(count, generator=generator)[:2] for _ in range(num_tokens)]
    ids = torch.stack(chosen).int().to(DEVICE)
    ids[-1, 0] = -1
    values = tuple(one.view(count, -1, one.shape[1]).double() for _, one in made)
    found = ops.moe(x, weights, ids, experts, "silu")
    assert error_of(found, expected_experts(x, weights, ids, values, biases)) < 2e-6
