"""The arena: layers and blocks never overlap, pages cost nothing before they are written."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.formats import KV_FORMATS, KVFormat
from octavo.kernels.reference import ReferenceOps
from octavo.kv_cache.spec import KVSpec, Plane, attention_kv, group_layers, latent_kv, state_kv
from octavo.kv_cache.storage import KVStorage
from octavo.step import Page, PageCopy
from octavo.visibility import Window

PLAIN = [name for name, one in KV_FORMATS.items() if not one.is_quantized]
FULL = attention_kv(3, 8, KV_FORMATS["float32"])
# the same bytes per token in another shape, so in another group
WINDOWED = attention_kv(2, 12, KV_FORMATS["float32"], visibility=Window(16))


@pytest.mark.parametrize("name", PLAIN)
def test_every_layer_of_a_group_has_its_own_memory(name: str) -> None:
    full = attention_kv(3, 8, KV_FORMATS[name])
    windowed = attention_kv(2, 12, KV_FORMATS[name], visibility=Window(16))
    specs = (full, windowed) * 2
    storage = KVStorage(group_layers(specs), num_chunks=5, block_size=16)
    storage.arena.zero_()
    for index in (0, 2):
        layer = storage.layer(index)
        layer.key.fill_(2 * index + 1)
        layer.value.fill_(2 * index + 2)
    for index in (0, 2):
        layer = storage.layer(index)
        assert layer.key.shape == (5, 16, 3, 8)
        assert (layer.key == 2 * index + 1).all()
        assert (layer.value == 2 * index + 2).all()
        assert layer.key[0].is_contiguous()
    element = KV_FORMATS[name].bits // 8
    assert storage.pages(0).shape == (5, 2 * 2 * 16 * 3 * 8 * element)
    assert [storage.group_of(index) for index in range(4)] == [0, 1, 0, 1]


def test_a_block_is_one_row_of_the_arena_whatever_group_it_serves() -> None:
    storage = KVStorage(group_layers((FULL, WINDOWED)), num_chunks=4, block_size=16)
    storage.arena.zero_()
    storage.layer(1).value[2] = 1.0
    assert storage.pages(0)[2].any()
    assert not storage.pages(0)[[0, 1, 3]].any()
    assert storage.layer(0).key.data_ptr() == storage.layer(1).key.data_ptr()


@pytest.mark.parametrize("name", PLAIN)
def test_poison_fills_the_given_blocks_with_nan_and_no_other(name: str) -> None:
    spec = attention_kv(3, 8, KV_FORMATS[name])
    storage = KVStorage(group_layers((spec, spec)), num_chunks=6, block_size=16)
    storage.arena.zero_()
    storage.poison((Page(0, 4), Page(0, 1)))
    storage.poison(())
    for index in range(2):
        layer = storage.layer(index)
        for part in (layer.key, layer.value):
            assert part[[1, 4]].isnan().all()
            assert (part[[0, 2, 3, 5]] == 0).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_large_arena_takes_memory_only_for_written_pages() -> None:
    before = resident_bytes()
    storage = KVStorage(group_layers((FULL,) * 8), num_chunks=2**16, block_size=16)
    assert storage.arena.nbytes == 1.5 * 2**30
    storage.layer(3).key[1000] = 1.0
    assert resident_bytes() - before < 64 * 2**20
    assert (storage.layer(3).key[1000] == 1).all()


def test_chunks_of_two_page_sizes_do_not_overlap() -> None:
    wide = attention_kv(5, 8, KV_FORMATS["float32"])
    state = Plane(name="state", shape=(40,), number="float32", bits=32, is_per_token=False)
    storage = KVStorage(group_layers((FULL, wide, FULL, state_kv(state))), 9, block_size=16)
    storage.arena.zero_()
    written = 0
    for chunk, layer in enumerate((0, 1, 3, 2, 1, 0, 3, 3)):
        page_class = storage.layout.class_of[storage.group_of(layer)]
        count = storage.layout.classes[page_class].pages_per_chunk
        for plane in storage.layer(layer).planes.values():
            mine = plane[chunk * count : (chunk + 1) * count]
            assert not mine.any(), "another class wrote here"
            mine.fill_(1)
            written += mine.numel()
    assert storage.arena.view(torch.float32).sum() == written
    assert not storage.arena.view(9, -1)[8].any()


def test_copies_go_from_page_to_page_of_their_class() -> None:
    wide = attention_kv(5, 8, KV_FORMATS["float32"])
    storage = KVStorage(group_layers((FULL, wide)), num_chunks=6, block_size=16)
    storage.arena.zero_()
    first, second = storage.layout.pages_per_chunk.tolist()
    there = 2 * second  # the first class has chunks 0 and 1
    storage.layer(0).key[1] = 3.0
    storage.layer(1).value[there] = 5.0
    copies = [PageCopy(0, 1, 2), PageCopy(1, there, there + 1), PageCopy(0, 2, 2 * first - 1)]
    storage.copy(copies, ReferenceOps(1))
    assert (storage.layer(0).key[[2, 2 * first - 1]] == 3).all()
    assert (storage.layer(1).value[there + 1] == 5).all()


def test_a_huge_block_id_reaches_its_own_page() -> None:
    storage = KVStorage(group_layers((FULL,) * 8), num_chunks=2**16, block_size=16)
    last = storage.num_chunks - 1
    storage.layer(7).value[last, 15] = 3.0
    assert torch.equal(storage.layer(7).value[last, 15], torch.full((3, 8), 3.0))


INT8, INT4, FP8 = KV_FORMATS["int8"], KV_FORMATS["int4"], KV_FORMATS["fp8"]


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (attention_kv(3, 64, INT8), {"key": (3, 64), "key_scale": (3, 1), "value_scale": (3, 1)}),
        (
            attention_kv(1, 64, INT8, value_format=INT4),
            {"key": (1, 64), "value": (1, 32), "key_scale": (1, 1), "value_scale": (1, 2)},
        ),
        (attention_kv(2, 64, FP8), {"value": (2, 64), "value_scale": (2, 1)}),
        (latent_kv(512, 64, KV_FORMATS["bfloat16"]), {"latent": (576,)}),
        (latent_kv(512, 64, INT8), {"latent": (576,), "latent_scale": (2,)}),
        (latent_kv(512, 64, INT4), {"latent": (288,), "latent_scale": (18,)}),
    ],
    ids=["int8", "int8/int4", "fp8", "latent", "latent int8", "latent int4"],
)
def test_planes_of_a_page_overlap_in_no_layer_and_fill_it(
    spec: KVSpec, shapes: dict[str, tuple[int, ...]]
) -> None:
    (group,) = group_layers((spec,) * 3)
    storage = KVStorage((group,), num_chunks=4, block_size=16)
    storage.arena.zero_()
    num_bytes = 0
    for index in range(3):
        planes = storage.layer(index).planes
        assert {name: tuple(planes[name].shape[2:]) for name in shapes} == shapes
        for tensor in planes.values():
            assert tensor[0].is_contiguous()
            raw = tensor.view(torch.uint8)
            assert not raw.any(), "it was written through another plane"
            raw.fill_(1)
            num_bytes += raw.numel()
    assert storage.arena.count_nonzero() == num_bytes
    assert num_bytes == 4 * 3 * 16 * spec.token_bytes


@pytest.mark.parametrize("spec", [attention_kv(2, 64, INT8), attention_kv(2, 64, INT4)])
def test_poisoned_integers_are_nan_through_their_scales(spec: KVSpec) -> None:
    storage = KVStorage(group_layers((spec,)), num_chunks=3, block_size=16)
    storage.arena.zero_()
    storage.poison([Page(0, 2)])
    planes = storage.layer(0).planes
    for name in ("key_scale", "value_scale"):
        assert planes[name][2].isnan().all()
        assert not planes[name][:2].isnan().any()


def test_integers_without_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="scales"):
        KVFormat(name="int8", bits=8)


def test_eight_bits_hold_almost_twice_as_many_tokens_and_four_more_than_three_times() -> None:
    wide = attention_kv(8, 128, KV_FORMATS["bfloat16"]).token_bytes
    assert wide / attention_kv(8, 128, INT8).token_bytes > 1.94
    assert wide / attention_kv(8, 128, INT4).token_bytes > 3.5


def test_specs_that_store_otherwise_have_another_identity() -> None:
    bfloat16 = KV_FORMATS["bfloat16"]
    specs = [
        attention_kv(2, 64, bfloat16),
        attention_kv(2, 64, KV_FORMATS["float16"]),
        attention_kv(4, 32, bfloat16),
        attention_kv(2, 64, bfloat16, value_format=INT8),
        attention_kv(2, 64, bfloat16, visibility=Window(8)),
        attention_kv(2, 64, INT4),
        attention_kv(2, 64, replace(INT4, scale_elements=64)),
        latent_kv(64, 64, bfloat16),
    ]
    assert len({spec.identity for spec in specs}) == len(specs)
