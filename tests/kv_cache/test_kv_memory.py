"""What models whose layers are not alike hold of the KV memory, against one table for all."""

from __future__ import annotations

import pytest

from benchmarks.kv_memory import BLOCK_SIZE, PATTERNS, STEP_TOKENS, measure
from octavo.kv_cache.spec import group_layers


@pytest.mark.parametrize(
    ("name", "most"), [("gpt-oss-20b", 0.52), ("Llama-4-Scout", 0.32), ("Gemma-3-27B", 0.22)]
)
def test_what_no_layer_sees_is_not_held_while_decoding(name: str, most: float) -> None:
    found = measure(PATTERNS[name])
    assert found["decode_share"] <= most
    # A prompt's step holds its own tokens beside what they see: a chunk more in every group.
    pattern = PATTERNS[name]
    groups = group_layers(pattern.specs())
    pages = sum(g.most_pages(pattern.length, BLOCK_SIZE, STEP_TOKENS) for g in groups)
    assert found["prefill_bytes"] <= pages * groups[0].page_bytes(BLOCK_SIZE)
