"""Latent attention of Triton's back end as layers ask it, against float64.

Runs on a GPU, else through Triton's interpreter at small shapes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.kernels.inputs import KVLayer
from tests.kernels.cases import floats
from tests.kernels.latent_cases import HEADS, NOPE, RANK, ROPE, expected_of, make_latents, make_op
from tests.kernels.triton.cases import TOLERANCES, assert_near, make_ops
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.attention import plan  # isort: skip
from octavo.kernels.triton.latent import choose, expand  # isort: skip
from tests.kernels.triton.attention.steps import one_step  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


FEW, FEWER = [1, 5, 16, 20, 1], [1, 1, 16, 20, 9]


@pytest.mark.parametrize(  # Every pair of two values.
    ("form", "is_planned", "query_lens"),
    [
        *(("deterministic", False, FEW), ("deterministic", True, FEWER)),
        *(("absorbed", False, FEWER), ("absorbed", True, FEW)),
        *(("expanded", False, FEW), ("expanded", True, FEWER)),
        *(("expanded in ranges", False, FEWER), ("expanded in ranges", True, FEW)),
    ],
    ids=str,
)
def test_decodes_short_and_long_chunks_in_one_step(
    rng: np.random.Generator,
    form: str,
    is_planned: bool,
    query_lens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form.startswith("expanded"):
        monkeypatch.setattr(choose, "MAX_PADDED_TOKENS", 4)
        for module in (choose, plan):
            monkeypatch.setattr(module, "SHORT_QUERIES", 8)
    if form == "expanded in ranges":
        monkeypatch.setattr(expand, "EXPANDED_TOKENS", 1)
    ops = make_ops(is_deterministic=form == "deterministic")
    lengths = [33, 150, 16, 200, 41]
    paged = make_latents(rng, lengths, RANK + ROPE, device=DEVICE)
    batch = paged.batch(lengths, query_lens)
    if is_planned:
        step = one_step(lengths, query_lens)
        (batch,) = step.on_device([batch], [torch.from_numpy(step.partial_starts).to(DEVICE)])
    op, kv_b = make_op(rng, ops, 256, DEVICE)
    total = sum(query_lens)
    wide = floats(rng, total, HEADS * (NOPE + ROPE) + RANK + ROPE)
    q_TN, latent_TC = wide.split([HEADS * (NOPE + ROPE), RANK + ROPE], dim=1)
    expected, kept = expected_of(q_TN.contiguous(), latent_TC, op, kv_b, paged, batch)
    moved = wide.to(DEVICE).split([HEADS * (NOPE + ROPE), RANK + ROPE], dim=1)
    layer = KVLayer(latent=paged.pages_BPC)
    found = ops.latent_attention(*moved, op, layer, batch)
    assert_near(found, expected, TOLERANCES[torch.float32])
    slots = batch.slot_mapping_T
    assert_near(paged.pages_BPC[slots // 16, slots % 16], kept, TOLERANCES[torch.float32])
