"""A token's logits are the same bits alone, in a batch, in chunks, and on other blocks.

The reference back end does not promise this; the native one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.models.decoder import Decoder
from tests.models.parity import MAX_MODEL_LEN, load, ops_or_skip, prompts
from tests.models.tiny import save_tiny
from tests.runner.driver import Driver

NUM_OUTPUTS = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    tokens: list[int]
    logits: Tensor


@pytest.fixture(params=["llama", "qwen2-window", "mixtral", "qwen2-moe", "olmoe-clipped"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    ops = ops_or_skip("native")
    return load(save_tiny(request.param, tmp_path), ops, MAX_MODEL_LEN)


def run(decoder: Decoder, chunks: Sequence[int], *, neighbours: int, seed: int) -> Run:
    """Computes one prompt in `chunks` and decodes, beside sequences that come and go."""
    lens = (61, *(3 + 14 * n for n in range(neighbours)))
    first, *others = prompts(decoder.spec.vocab_size, lens)
    with Driver(decoder, seed=seed) as driver:
        sequence = driver.add(first)
        beside = [driver.add(tokens) for tokens in others]
        for index, count in enumerate((*chunks, *[1] * (NUM_OUTPUTS - 1))):
            mixed = [(other, 1) for other in beside[:index] if other.num_computed]
            if index < len(beside):
                mixed.append((beside[index], beside[index].prompt_len))
            place = index % (len(mixed) + 1)
            driver.step([*mixed[:place], (sequence, count), *mixed[place:]])
    return Run(tokens=sequence.tokens, logits=torch.stack(sequence.logits))


def test_neither_neighbours_nor_chunks_nor_blocks_change_a_bit(decoder: Decoder) -> None:
    alone = run(decoder, (61,), neighbours=0, seed=1)
    for chunks, neighbours in (((61,), 4), ((1, 13, 30, 17), 0), ((7, 47, 7), 6), ((1,) * 61, 2)):
        other = run(decoder, chunks, neighbours=neighbours, seed=neighbours + 2)
        assert other.tokens == alone.tokens, (chunks, neighbours)
        assert torch.equal(other.logits, alone.logits), (chunks, neighbours)
