"""The memory planner: sums, limits and messages, on small numbers that can be checked by hand."""

from __future__ import annotations

import dataclasses
import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import EngineConfig
from octavo.device import DeviceMemory
from octavo.errors import CapacityError
from octavo.formats import WHOLE_VECTOR, KVFormat, kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.plan_text import describe, describe_groups
from octavo.kv_cache.planner import (
    GIB,
    ActivationShape,
    MemoryPlan,
    chunks_of_sequence,
    gpu_budget,
    host_budget,
    longest_sequence,
    plan_memory,
)
from octavo.kv_cache.records import SequenceKV
from octavo.kv_cache.spec import KVSpec, Plane, attention_kv, group_layers, state_kv
from octavo.visibility import Window

FULL = attention_kv(2, 64, kv_format("float32"))
HALF = attention_kv(2, 64, kv_format("float16"))
WINDOW = dataclasses.replace(FULL, visibility=Window(64))
SHAPE = ActivationShape(hidden_size=128, qkv_size=256, mlp_size=512, vocab_size=1000)


def plan(
    specs: tuple[KVSpec, ...] = (FULL,) * 4,
    *,
    available: int = 8 * GIB,
    weights: int = GIB,
    positions: int = 4096,
    **options: object,
) -> MemoryPlan:
    config = dataclasses.replace(EngineConfig(model="m"), **options)  # type: ignore[arg-type]
    return plan_memory(
        specs,
        weights_bytes=weights,
        activation_bytes=lambda n: SHAPE.step_bytes(n, min(n, config.max_num_seqs)),
        config=config,
        max_position_embeddings=positions,
        budget=host_budget(available, config.gpu_memory_utilization),
    )


def test_a_block_costs_the_keys_and_values_of_all_layers():
    made = plan()
    assert made.kv_token_bytes == 4 * 2 * 2 * 64 * 4
    assert made.block_bytes == 16 * made.kv_token_bytes


def test_the_parts_never_exceed_the_usable_memory():
    made = plan(available=2 * GIB)
    assert made.total_bytes <= made.usable_bytes == int(0.9 * 2 * GIB)


def test_the_cache_takes_at_most_four_gib_by_default():
    assert plan(available=64 * GIB).kv_bytes == 4 * GIB // 65536 * 65536


def test_the_cache_takes_no_more_than_all_sequences_can_fill():
    made = plan(max_num_seqs=2, positions=160)
    assert made.num_blocks == 2 * (160 // 16 + 1)


def test_a_given_context_may_exceed_the_default_of_four_gib():
    made = plan(available=32 * GIB, positions=10**7, max_model_len=2 * 10**6)
    assert made.max_model_len == 2 * 10**6
    assert made.kv_bytes > 4 * GIB


def test_an_absolute_cache_size_is_met_to_the_page():
    assert plan(kv_cache_memory_bytes=10 * 65536 + 1).num_blocks == 10


def test_an_absolute_cache_size_that_does_not_fit_says_what_is_left():
    with pytest.raises(CapacityError, match="use at most") as caught:
        plan(kv_cache_memory_bytes=8 * GIB)
    assert caught.value.field == "kv_cache_memory_bytes"


def test_an_absolute_cache_size_below_one_block_says_the_least():
    with pytest.raises(CapacityError, match="takes 131072 bytes"):
        plan(kv_cache_memory_bytes=1000)


def test_the_context_is_the_models_when_the_cache_holds_it():
    assert plan().max_model_len == 4096


def test_the_context_is_fitted_to_the_cache_when_none_is_given():
    made = plan(kv_cache_memory_bytes=11 * 65536)
    assert made.max_model_len == 10 * 16


def test_a_given_context_that_does_not_fit_says_which_would():
    with pytest.raises(CapacityError, match=r"max_model_len 160;.*float16") as caught:
        plan(kv_cache_memory_bytes=11 * 65536, max_model_len=200)
    assert caught.value.field == "max_model_len"
    assert plan(kv_cache_memory_bytes=11 * 65536, max_model_len=160).max_model_len == 160


def test_half_precision_is_no_advice_when_the_cache_has_it_already():
    with pytest.raises(CapacityError) as caught:
        plan((HALF,) * 4, kv_cache_memory_bytes=11 * 65536, max_model_len=2000)
    assert "float16" not in str(caught.value)


def test_weights_that_do_not_fit_say_what_is_missing_and_what_would_fit():
    with pytest.raises(CapacityError, match=r"are missing.*weights of up to .*GGUF.*free memory"):
        plan(weights=100 * GIB)


def test_free_memory_that_the_error_asks_for_is_enough():
    with pytest.raises(CapacityError) as caught:
        plan(weights=10 * GIB)
    words = str(caught.value).split()
    asked = float(words[-5])
    assert plan(weights=10 * GIB, available=int((asked + 0.01) * GIB)).num_blocks >= 2


def test_a_window_bounds_the_blocks_of_a_long_sequence():
    groups = group_layers((WINDOW,) * 2)
    # window 64, chunk 16: at most 64 + 16 + 16 tokens are held
    assert chunks_of_sequence(groups, 10**6, 16, 16) == 1 + 6
    assert chunks_of_sequence(groups, 17, 16, 16) == 1 + 2


STATE = state_kv(
    Plane(name="state", shape=(3, 1000), number="float32", bits=32, is_per_token=False)
)
INT8 = KVFormat(name="int8", bits=8, scale_elements=WHOLE_VECTOR)


def test_a_mixed_plan_holds_what_its_own_manager_can_hand_out():
    specs = (FULL, attention_kv(2, 64, INT8, visibility=Window(64)), STATE) * 2
    made = plan(specs, kv_cache_memory_bytes=20 * 2**20, max_num_seqs=50)
    assert len(made.layout.classes) == 3
    assert made.num_chunks == 20 * 2**20 // made.layout.chunk_bytes
    manager = KVCacheManager(
        made.groups,
        num_chunks=made.num_chunks,
        block_size=16,
        max_rows=50,
        max_model_len=made.max_model_len,
    )
    length, num_rows = 256, 0
    while num_rows < 50:
        kv = SequenceKV(root=b"", reads_cache=False, writes_cache=False)
        hit = manager.lookup(kv, array("i", [1] * length))
        if not manager.admit(kv, num_rows, hit, 1):
            break
        if not all(manager.allocate(kv, done, done + 1) for done in range(1, length)):
            break
        num_rows += 1
    assert made.num_requests(length) <= num_rows <= made.num_requests(length) + 2


def test_eight_bits_nearly_quarter_what_thirty_two_take():
    made = plan((attention_kv(2, 64, INT8),) * 4)
    assert plan().kv_token_bytes / made.kv_token_bytes == pytest.approx(4 * 64 / 66)
    assert "int8" in describe(made)


def test_the_groups_are_told_by_what_they_see_and_what_they_take():
    text = describe_groups(plan((FULL, WINDOW, STATE)))
    assert "1 layers that see all tokens: 1.0 KiB/token, float32" in text
    assert "1 layers that see a window of 64 tokens: 1.0 KiB/token, float32" in text
    assert "1 layers that see a state: 11.7 KiB/sequence, float32" in text


def test_a_context_that_does_not_fit_pages_of_several_sizes_says_which_would():
    specs = (FULL, STATE)
    with pytest.raises(CapacityError, match=r"max_model_len \d+;") as caught:
        plan(specs, kv_cache_memory_bytes=2**20, max_model_len=4000)
    fitting = int(re.search(r"max_model_len (\d+);", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert plan(specs, kv_cache_memory_bytes=2**20, max_model_len=fitting).max_model_len == fitting


def test_groups_of_a_mixed_model_add_up():
    groups = group_layers((FULL, WINDOW) * 2)
    assert chunks_of_sequence(groups, 1600, 16, 16) == 1 + 100 + 6


def test_tokens_in_one_step_default_to_512_and_hold_at_least_a_block():
    assert plan().max_num_batched_tokens == 512
    assert plan(max_num_batched_tokens=3).max_num_batched_tokens == 16
    assert plan(max_num_batched_tokens=64).activation_bytes < plan().activation_bytes


def gpu_plan(
    in_use: int = GIB, *, weights: int = GIB, measured: int | None = None, **options: object
) -> MemoryPlan:
    """Of a card of 10 GiB."""
    config = dataclasses.replace(EngineConfig(model="m"), **options)  # type: ignore[arg-type]
    memory = DeviceMemory(total_bytes=10 * GIB, available_bytes=10 * GIB - in_use)
    return plan_memory(
        (HALF,) * 4,
        weights_bytes=weights,
        activation_bytes=lambda n: n * 2**17 if measured is None else measured,
        config=config,
        max_position_embeddings=10**6,
        budget=gpu_budget(memory, config.gpu_memory_utilization, 2**28),
    )


def test_a_gpu_gives_its_share_less_what_others_hold_and_the_cache_takes_the_rest():
    made = gpu_plan()
    assert made.usable_bytes == 9 * GIB - GIB
    assert made.other_bytes == GIB
    assert made.usable_bytes - made.block_bytes < made.total_bytes <= made.usable_bytes
    assert made.kv_bytes > 4 * GIB
    assert gpu_plan(kv_cache_memory_bytes=GIB).kv_bytes == GIB


def test_a_step_on_a_gpu_has_as_many_tokens_as_leave_the_cache_three_quarters():
    assert gpu_plan().max_num_batched_tokens == 8192
    assert gpu_plan(4 * GIB).max_num_batched_tokens == 4096
    assert gpu_plan(6 * GIB).max_num_batched_tokens == 2048
    assert gpu_plan(6 * GIB, max_num_batched_tokens=5000).max_num_batched_tokens == 5000
    assert gpu_plan(measured=12345).activation_bytes == 12345


def test_the_description_of_a_gpu_names_graphs_and_others():
    text = describe(gpu_plan())
    for words in (
        "graphs          0.25",
        "others          1.00",
        "free            1.00",
        "float16",
    ):
        assert words in text


def test_what_others_hold_on_a_gpu_is_said_when_the_model_does_not_fit():
    with pytest.raises(CapacityError, match=r"10.00 GiB x .* less 4.00 GiB in use by others") as no:
        gpu_plan(4 * GIB, weights=5 * GIB)
    assert "GGUF" not in str(no.value)
    with pytest.raises(CapacityError, match=r"are missing.*4.00 GiB in use.*max_model_len \d+;"):
        gpu_plan(4 * GIB, max_model_len=10**7)


@given(st.integers(1, 500), st.integers(1, 5000), st.integers(1, 300), st.booleans())
def test_the_longest_sequence_fits_and_one_more_token_does_not(
    num_chunks: int, limit: int, chunk: int, mixed: bool
):
    groups = group_layers((FULL, WINDOW) if mixed else (FULL,))
    found = longest_sequence(groups, num_chunks, limit, 16, chunk)
    if found:
        assert chunks_of_sequence(groups, found, 16, chunk) <= num_chunks
    if found < limit:
        assert chunks_of_sequence(groups, found + 1, 16, chunk) > num_chunks


def test_the_description_names_every_part():
    text = describe(plan())
    for word in ("weights", "activations", "KV cache", "context", "fits", "4.0 KiB/token"):
        assert word in text
