"""What the tests of Triton's kernels share: inputs on their device, exact results, tolerances."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from octavo.formats import WEIGHT_FORMATS
from octavo.kernels.activations import Activation
from octavo.kernels.inputs import AttentionBatch, KVLayer
from octavo.kernels.weights import ExpertWeights, Weight
from tests.kernels.cases import PagedKV, exact_gate, floats
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.backend import TritonOps  # isort: skip

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
if DEVICE == "cpu":
    del TOLERANCES[torch.bfloat16]  # Triton 3.6's interpreter multiplies the bits of bf16.
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def make_ops(*, is_deterministic: bool = True) -> TritonOps:
    return TritonOps(1, is_deterministic=is_deterministic)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By norm: |found - expected| <= tolerance * |expected|; NaN never passes."""
    assert found.shape == expected.shape
    error = (found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
    assert error <= tolerance, error


def on_device(
    layer: KVLayer, batch: AttentionBatch, *, copy: bool = False
) -> tuple[KVLayer, AttentionBatch]:
    planes = {name: x.to(DEVICE, copy=copy) for name, x in layer.planes.items()}
    moved = KVLayer(layer.parts, **planes)
    return moved, AttentionBatch(
        positions_T=batch.positions_T.to(DEVICE),
        slot_mapping_T=batch.slot_mapping_T.to(DEVICE),
        query_starts=batch.query_starts.to(DEVICE),
        seq_lens_S=batch.seq_lens_S.to(DEVICE),
        block_table=batch.block_table.to(DEVICE),
        plan=batch.plan,
    )


def make_stack(
    rng: np.random.Generator, count: int, rows: int, cols: int, dtype: torch.dtype
) -> tuple[Weight, ...]:
    """Returns `count` matrices as views of one poisoned stack with a gap after each."""
    stack = torch.full((count, rows + 1, cols), math.nan, dtype=dtype, device=DEVICE)
    stack[:, :rows] = (floats(rng, count, rows, cols) / math.sqrt(cols)).to(DEVICE, dtype)
    form = WEIGHT_FORMATS[NAMES[dtype]]
    return tuple(
        Weight(data=stack[e, :rows], format=form, rows=rows, cols=cols) for e in range(count)
    )


def make_experts(
    rng: np.random.Generator, count: int, hidden: int, inner: int, dtype: torch.dtype
) -> ExpertWeights:
    return ExpertWeights(
        gate=make_stack(rng, count, inner, hidden, dtype),
        up=make_stack(rng, count, inner, hidden, dtype),
        down=make_stack(rng, count, hidden, inner, dtype),
    )


def exact_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    row = x.double()
    return exact_gate(row @ gate.double().T, row @ up.double().T, activation) @ down.double().T


def exact_moe(
    x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, activation: Activation = "silu"
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t in range(len(x)):
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            if 0 <= e < len(experts.gate):
                out[t] += weight * _exact_expert(x[t].double(), experts, e, activation)
    return out


def _exact_expert(x_M: Tensor, experts: ExpertWeights, e: int, activation: Activation) -> Tensor:
    gate = experts.gate[e].data.double() @ x_M
    up = experts.up[e].data.double() @ x_M
    biases = experts.biases
    if biases is not None:
        gate, up = gate + biases.gate_EF[e].double(), up + biases.up_EF[e].double()
    out = experts.down[e].data.double() @ exact_gate(gate, up, activation)
    return out if biases is None else out + biases.down_EM[e].double()


def routed(rng: np.random.Generator, tokens: int, count: int, top_k: int) -> tuple[Tensor, Tensor]:
    ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)])
    weights = floats(rng, tokens, top_k).abs().to(DEVICE)
    return weights, torch.from_numpy(ids).to(DEVICE, torch.int32)


def there(paged: PagedKV, batch: AttentionBatch) -> tuple[KVLayer, AttentionBatch]:
    """Returns both on the device, keys and values in one arena as the engine has them."""
    if DEVICE == "cpu":
        return paged.layer, batch
    key = paged.layer.key
    arena = torch.stack((key, paged.layer.value), 1).to(DEVICE)
    moved = replace(
        batch,
        positions_T=batch.positions_T.to(DEVICE),
        slot_mapping_T=batch.slot_mapping_T.to(DEVICE),
        query_starts=batch.query_starts.to(DEVICE),
        seq_lens_S=batch.seq_lens_S.to(DEVICE),
        block_table=batch.block_table.to(DEVICE),
    )
    return KVLayer(key=arena[:, 0], value=arena[:, 1]), moved
