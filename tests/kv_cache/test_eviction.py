"""The order of eviction against a plain list of what is in it, and what it learns."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.eviction import EvictionOrder
from octavo.kv_cache.hash_memory import HashMemory, hash_of

NUM_BLOCKS = 40


def ids(blocks: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(blocks, np.int32)


@settings(deadline=None)
@given(st.data())
def test_blocks_of_equal_use_go_in_the_order_in_which_they_came(data: st.DataObject) -> None:
    order = EvictionOrder(NUM_BLOCKS)
    uses = dict.fromkeys(range(NUM_BLOCKS), 0)
    inside: list[int] = []
    for number in range(data.draw(st.integers(1, 30))):
        out = [block for block in range(NUM_BLOCKS) if block not in inside]
        what = data.draw(st.sampled_from(["append", "use", "evict"]))
        if what == "append" and out:
            blocks = data.draw(st.lists(st.sampled_from(out), min_size=1, unique=True))
            for block in blocks:
                if not uses[block]:
                    order.stored(block, f"{number} {block}".encode() * 4, 0)
                    uses[block] = 1
            order.append(ids(blocks))
            inside += blocks
        elif what == "use" and inside:
            blocks = data.draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))
            order.asked_for(ids(blocks))
            order.remove(ids(blocks))
            inside = [block for block in inside if block not in blocks]
            for block in blocks:
                uses[block] += 1
        elif what == "evict" and inside:
            found = order.next(data.draw(st.integers(1, 10))).tolist()
            level = {min(uses[block].bit_length(), 4) for block in found}
            assert len(level) == 1
            alike = [block for block in inside if min(uses[block].bit_length(), 4) in level]
            assert found == alike[: len(found)]
            order.evict(ids(found), [f"{number} {block}".encode() * 4 for block in found])
            inside = [block for block in inside if block not in found]
            uses.update(dict.fromkeys(found, 0))
        assert len(order) == len(inside)
        assert sorted(order.all().tolist()) == sorted(inside)
        assert [block in order for block in range(NUM_BLOCKS)] == [
            block in inside for block in range(NUM_BLOCKS)
        ]


def test_a_block_that_comes_back_soon_keeps_its_uses_but_has_never_more_than_its_parent() -> None:
    order = EvictionOrder(NUM_BLOCKS)
    digests = [hashlib.sha256(bytes([block])).digest() for block in range(4)]
    for block in (1, 2, 3):
        order.stored(block, digests[block], 0)
    order.append(ids([1, 2, 3]))
    order.evict(ids([1, 2]), digests[1:3])
    assert [order.was_evicted(digest) for digest in digests] == [False, True, True, False]
    order.stored(4, digests[1], 0)
    assert not order.was_evicted(digests[1])
    order.append(ids([4]))
    order.stored(5, digests[2], 3)
    order.append(ids([5]))
    others = list(range(10, NUM_BLOCKS))
    for block in others:
        order.stored(block, hashlib.sha256(bytes([block])).digest(), 0)
    order.append(ids(others))
    evicted = [block for _ in range(len(order)) for block in evict_one(order)]
    assert evicted[:2] == [3, 5]
    assert evicted.index(4) > 2


def evict_one(order: EvictionOrder) -> list[int]:
    found = order.next(1)
    order.evict(found, [bytes(32)] * len(found))
    return found.tolist()


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))))
def test_what_is_remembered_is_what_was_put_last(pairs: list[tuple[int, int]]) -> None:
    memory = HashMemory(8)
    for hash_, number in pairs:
        memory.put(hash_, number)
        assert memory.get(hash_) == number
    for hash_, _ in pairs:
        assert memory.get(hash_) in (None, dict(pairs)[hash_])
    if pairs:
        assert memory.pop(pairs[-1][0]) == pairs[-1][1]
        assert memory.get(pairs[-1][0]) is None


def test_hardly_a_hash_is_lost_while_half_of_the_places_are_empty() -> None:
    memory = HashMemory(1 << 12)
    hashes = [hash_of(hashlib.sha256(bytes([i % 256, i // 256])).digest()) for i in range(1 << 11)]
    for number, hash_ in enumerate(hashes):
        memory.put(hash_, number)
    kept = [number for number, hash_ in enumerate(hashes) if memory.get(hash_) == number]
    assert len(kept) > 0.99 * len(hashes)


def test_hashes_of_digests_are_their_first_bytes() -> None:
    assert hash_of(bytes(range(32))) == 0x0706050403020100
