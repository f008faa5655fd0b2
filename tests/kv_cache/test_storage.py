"""The arena: layers and blocks never overlap, pages cost nothing before they are written."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.formats import KV_FORMATS
from octavo.kv_cache.spec import KVSpec, group_layers
from octavo.kv_cache.storage import KVStorage

FULL = KVSpec(num_kv_heads=3, head_size=8, format=KV_FORMATS["float32"])
# the same bytes per token in another shape, so in another group
WINDOWED = replace(FULL, num_kv_heads=2, head_size=12, window=16)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_every_layer_of_a_group_has_its_own_memory(name: str) -> None:
    specs = tuple(replace(s, format=KV_FORMATS[name]) for s in (FULL, WINDOWED, FULL, WINDOWED))
    storage = KVStorage(group_layers(specs), num_blocks=5, block_size=16)
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
    element = KV_FORMATS[name].element_bytes
    assert storage.arena.shape == (5, 2 * 2 * 16 * 3 * 8 * element)
    assert [storage.group_of(index) for index in range(4)] == [0, 1, 0, 1]


def test_a_block_is_one_row_of_the_arena_whatever_group_it_serves() -> None:
    storage = KVStorage(group_layers((FULL, WINDOWED)), num_blocks=4, block_size=16)
    storage.arena.zero_()
    storage.layer(1).value[2] = 1.0
    assert storage.arena[2].any()
    assert not storage.arena[[0, 1, 3]].any()
    assert storage.layer(0).key.data_ptr() == storage.layer(1).key.data_ptr()


@pytest.mark.parametrize("name", KV_FORMATS)
def test_poison_fills_the_given_blocks_with_nan_and_no_other(name: str) -> None:
    spec = replace(FULL, format=KV_FORMATS[name])
    storage = KVStorage(group_layers((spec, spec)), num_blocks=6, block_size=16)
    storage.arena.zero_()
    storage.poison((4, 1))
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
    storage = KVStorage(group_layers((FULL,) * 8), num_blocks=2**16, block_size=16)
    assert storage.arena.nbytes == 1.5 * 2**30
    storage.layer(3).key[1000] = 1.0
    assert resident_bytes() - before < 64 * 2**20
    assert (storage.layer(3).key[1000] == 1).all()


def test_groups_with_pages_of_different_sizes_are_refused() -> None:
    groups = group_layers((FULL,)) + group_layers((FULL, FULL))
    with pytest.raises(ValueError, match="pages of one size"):
        KVStorage(groups, num_blocks=2, block_size=16)


def test_a_huge_block_id_reaches_its_own_page() -> None:
    storage = KVStorage(group_layers((FULL,) * 8), num_blocks=2**16, block_size=16)
    last = storage.num_blocks - 1
    storage.layer(7).value[last, 15] = 3.0
    assert torch.equal(storage.layer(7).value[last, 15], torch.full((3, 8), 3.0))
