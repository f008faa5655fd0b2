"""Pages of several sizes under random driving: no byte belongs to two, what fits can be had."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.formats import KV_FORMATS
from octavo.kv_cache.block_pool import BlockKey
from octavo.kv_cache.chunk_pool import ChunkPool
from octavo.kv_cache.layout import arena_layout
from octavo.kv_cache.page_pools import PagePools
from octavo.kv_cache.spec import KVGroup, attention_kv

BLOCK = 16


def group(head_size: int, num_slots: int = 1) -> KVGroup:
    spec = attention_kv(1, head_size, KV_FORMATS["bfloat16"])
    return KVGroup(spec=spec, layers=tuple(range(num_slots)), num_slots=num_slots)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=4))
def test_pages_of_every_class_fill_almost_all_of_a_chunk(sizes: list[int]) -> None:
    layout = arena_layout([group(8, num_slots) for num_slots in sizes], BLOCK)
    assert sorted(g for one in layout.classes for g in one.groups) == list(range(len(sizes)))
    for one in layout.classes:
        assert one.page_bytes <= one.stride
        assert one.stride % 16 == 0
        assert one.stride * one.pages_per_chunk == layout.chunk_bytes
        if len(layout.classes) > 1:
            assert one.page_bytes * one.pages_per_chunk >= 0.85 * layout.chunk_bytes
    largest = max(one.page_bytes for one in layout.classes)
    assert layout.chunk_bytes <= 33 * largest, "small arenas need small chunks"


def test_where_all_pages_have_one_size_a_chunk_is_a_page() -> None:
    layout = arena_layout([group(64), group(64)], BLOCK)
    assert layout.chunk_bytes == group(64).page_bytes(BLOCK)
    assert [one.pages_per_chunk for one in layout.classes] == [1]
    pools = PagePools(layout, 10)
    assert pools.num_pages == 9
    assert pools.room().fits(np.array([9]))
    assert not pools.room().fits(np.array([10]))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([8, 16, 24, 40]), min_size=2, max_size=3, unique=True),
    num_chunks=st.integers(3, 12),
    data=st.data(),
)
def test_what_fits_can_be_had_and_no_byte_belongs_to_two(
    sizes: list[int], num_chunks: int, data: st.DataObject
) -> None:
    layout = arena_layout([group(size) for size in sizes], BLOCK)
    pools = PagePools(layout, num_chunks)
    held: list[tuple[int, int]] = []
    keyed: dict[BlockKey, tuple[int, int]] = {}
    for turn in range(25):
        what = data.draw(st.sampled_from(["take", "take", "release", "publish", "hit"]))
        if what == "take":
            need = np.array([data.draw(st.integers(0, 20)) for _ in sizes])
            fits, keys = pools.room().fits(need), pools.reserve(need)
            assert (keys is not None) == fits
            for index, count in enumerate(need.tolist() if keys is not None else ()):
                pages, evicted = pools.pools[index].allocate(count)
                held += [(index, page) for page in pages]
                keys = [*(keys or ()), *evicted]
            for key in keys or ():
                del keyed[key]
        elif what == "release" and held:
            for one in data.draw(st.lists(st.sampled_from(held), unique=True)):
                held.remove(one)
                pools.pools[one[0]].release([one[1]])
        elif what == "publish" and held:
            index, page = data.draw(st.sampled_from(held))
            if pools.pools[index].key(page) is None:
                key = BlockKey(index, str(turn).encode())
                pools.pools[index].set_key(page, key)
                keyed[key] = index, page
        elif what == "hit" and keyed:
            index, page = data.draw(st.sampled_from(sorted(keyed.values())))
            if (index, page) not in held:
                taken = [[np.array([page])] if i == index else [] for i in range(len(sizes))]
                before = pools.room(taken)
                pools.pools[index].acquire([page])
                held.append((index, page))
                after = pools.room()
                assert (before.loose == after.loose).all()
                assert before.spare_chunks == after.spare_chunks
        pools.check()
        begins = sorted((page * layout.classes[i].stride, i) for i, page in held)
        ends = [begin + layout.classes[i].page_bytes for begin, i in begins]
        assert all(end <= begin for end, (begin, _) in zip(ends, begins[1:], strict=False))
        assert not ends or ends[-1] <= num_chunks * layout.chunk_bytes
        for key, (index, page) in keyed.items():
            assert pools.pools[index].key(page) == key


def test_prefixes_are_evicted_only_when_no_chunk_is_free() -> None:
    layout = arena_layout([group(8), group(16)], BLOCK)
    pools = PagePools(layout, 6)
    first, second = layout.pages_per_chunk.tolist()
    assert pools.reserve(np.array([0, second])) == []
    pages, _ = pools.pools[1].allocate(second)
    pools.pools[1].set_key(pages[0], BlockKey(1, b"kept"))
    pools.pools[1].release(pages)
    # Four chunks are nobody's; the fifth has to come from the other class, with its prefix.
    assert pools.reserve(np.array([5 * first - 1, 0])) == []
    assert pools.reserve(np.array([6 * first - 1, 0])) == [BlockKey(1, b"kept")]


def test_chunks_go_back_to_nobody_but_through_their_owner() -> None:
    chunks = ChunkPool(4)
    taken = chunks.take(7, 3)
    assert taken.tolist() == [0, 1, 2]
    chunks.give_back(7, taken[:1])
    assert chunks.take(8, 2).tolist() == [0, 3]
    assert chunks.num_free == 0
    with pytest.raises(AssertionError, match="another"):
        chunks.give_back(7, taken)
