"""The block pool under random driving: no block is lost, none is handed out twice."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.kv_cache.block_pool import MAX_ROOM_SHARE, NULL_BLOCK, BlockKey, BlockPool
from octavo.kv_cache.free_pages import REGION
from octavo.kv_cache.runs import share_in_runs


class PoolMachine(RuleBasedStateMachine):
    """Keeps its own count of every reference and compares after every operation.

    So small that nothing is evicted before there is need: the very blocks are foretold.
    """

    num_blocks = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.num_blocks)
        self.held: list[int] = []
        self.keys: dict[BlockKey, int] = {}
        self.hit: set[int] = set()
        self.cached: list[int] = []
        """Keyed and held by nobody, oldest first."""
        self.next_key = 0

    @rule(data=st.data(), count=st.integers(0, 5))
    def allocate(self, data: st.DataObject, count: int) -> None:
        after = data.draw(st.sampled_from([NULL_BLOCK, *self.held, self.num_blocks - 1]))
        if count > self.pool.num_free:
            return
        num_free = self.pool.num_free
        num_empty = num_free - self.pool.num_cached
        blocks, evicted = self.pool.allocate(count, after)
        assert len(set(blocks)) == count
        assert self.pool.num_free == num_free - count
        assert not set(blocks) & set(self.held), "a held block was handed out"
        taken = [self.keys.pop(key) for key in evicted]
        self.check_evicted(taken, count - num_empty)
        self.cached = [block for block in self.cached if block not in taken]
        self.hit -= set(taken)
        self.held += blocks

    def check_evicted(self, taken: list[int], needed: int) -> None:
        assert len(taken) == max(needed, 0), "evicted more or less than was needed"
        assert set(taken) <= set(self.cached)
        for is_hit in (False, True):
            alike = [block for block in self.cached if (block in self.hit) == is_hit]
            count = len(set(taken) & set(alike))
            assert is_hit or set(taken) & set(alike) == set(alike[:count]), "out of order"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        places = st.sampled_from(range(len(self.held)))
        blocks = [self.held[i] for i in data.draw(st.lists(places, min_size=1, unique=True))]
        for block in blocks:
            self.held.remove(block)
        last = dict.fromkeys(blocks[::-1])  # of a block that is named twice the second time counts
        freed = [block for block in reversed(last) if block not in self.held]
        self.cached += [block for block in freed if block in self.keys.values()]
        empty = [block for block in freed if block not in self.keys.values()]
        assert self.pool.release(blocks) == empty

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        """Several sequences take a block each."""
        most = min(len(set(self.held)), self.pool.num_free)
        after = data.draw(st.lists(st.sampled_from(self.held), max_size=most, unique=True))
        blocks, evicted = self.pool.allocate_each(np.array(after, np.int32))
        taken = [self.keys.pop(key) for key in evicted]
        self.cached = [block for block in self.cached if block not in taken]
        self.hit.difference_update(taken)
        self.held += blocks.tolist()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held), min_size=1, unique=True))
        for block in blocks:
            if self.pool.key(block) is None:
                self.next_key += 1
                key = BlockKey(0, str(self.next_key).encode())
                self.pool.set_key(block, key)
                self.keys[key] = block

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        keyed = st.sampled_from(sorted(self.keys.values()))
        blocks = data.draw(st.lists(keyed, min_size=1, unique=True))
        self.pool.acquire([NULL_BLOCK, *blocks])
        self.cached = [block for block in self.cached if block not in blocks]
        self.hit.update(blocks)
        self.held += blocks

    @rule()
    def forget_keys(self) -> None:
        assert sorted(self.pool.forget_keys()) == sorted(self.cached)
        self.keys.clear()
        self.cached.clear()
        self.hit.clear()

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        for block in range(1, self.num_blocks):
            assert self.pool.ref_count(block) == self.held.count(block)
        assert self.pool.num_referenced == len(set(self.held))
        assert set(self.cached) == set(self.keys.values()) - set(self.held)
        assert self.pool.num_cached == len(self.cached)


class LargePoolMachine(PoolMachine):
    """Large enough for regions, extents and eviction ahead of need."""

    num_blocks = 700

    @rule(data=st.data(), count=st.integers(0, 400))
    def allocate_many(self, data: st.DataObject, count: int) -> None:
        self.allocate(data, min(count, self.pool.num_free))

    @rule(count=st.integers(1, 300), do_publish=st.booleans())
    def release_many(self, count: int, do_publish: bool) -> None:
        """What was got together goes together, some of it cached."""
        blocks = list(dict.fromkeys(self.held[-count:]))
        for block in blocks if do_publish else ():
            if self.pool.key(block) is None:
                self.next_key += 1
                key = BlockKey(0, str(self.next_key).encode())
                self.pool.set_key(block, key)
                self.keys[key] = block
        for block in blocks:
            self.held.remove(block)
        freed = [block for block in blocks if block not in self.held]
        keyed = set(self.keys.values())
        self.cached += [block for block in freed if block in keyed]
        assert set(self.pool.release(blocks)) == set(freed) - keyed

    def check_evicted(self, taken: list[int], needed: int) -> None:
        assert max(needed, 0) <= len(taken)
        assert len(taken) <= max(needed, 0) + MAX_ROOM_SHARE * len(set(self.held)) + REGION
        assert set(taken) <= set(self.cached)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLargePool = LargePoolMachine.TestCase
TestLargePool.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def test_blocks_without_a_prefix_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    blocks, _ = pool.allocate(3)
    pool.set_key(blocks[0], BlockKey(0, b"a"))
    pool.release(blocks)
    again, evicted = pool.allocate(2)
    assert set(again) == set(blocks[1:])
    assert evicted == []


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = cached_pool(4, [3, 1, 2])
    assert evict(pool, 2) == [3, 1]


def cached_pool(num_blocks: int, order: list[int]) -> BlockPool:
    """Returns a pool whose blocks are all cached, given back in `order`."""
    pool = BlockPool(num_blocks)
    blocks, _ = pool.allocate(num_blocks - 1)
    for block in blocks:
        pool.set_key(block, BlockKey(0, block.to_bytes(4, "big")))
    pool.release(order)
    return pool


def evict(pool: BlockPool, count: int) -> list[int]:
    """Returns the blocks that lose their key for `count` new ones."""
    return [int.from_bytes(key.digest, "big") for key in pool.allocate(count)[1]]


def touch(pool: BlockPool, blocks: list[int]) -> None:
    pool.acquire(blocks)
    pool.release(blocks)


def test_blocks_that_were_asked_for_again_outlive_those_that_were_not() -> None:
    pool = cached_pool(6, [1, 2, 3, 4, 5])
    touch(pool, [2])
    touch(pool, [1])
    assert evict(pool, 4) == [3, 4, 5, 2]


def test_a_block_that_lost_its_key_is_new_when_it_is_stored_again() -> None:
    pool = cached_pool(3, [1, 2])
    touch(pool, [1, 2])
    for block in pool.allocate(2)[0]:
        pool.set_key(block, BlockKey(0, bytes([7, 7, 7, block])))
    pool.release([1, 2])
    touch(pool, [1])
    assert evict(pool, 1) == [0x07070702]


def test_what_was_useful_once_goes_when_it_is_not_asked_for_any_more() -> None:
    """A scan of new blocks does not keep dead ones for ever."""
    pool = cached_pool(101, list(range(1, 101)))
    touch(pool, list(range(1, 51)))
    evicted: set[int] = set()
    for number in range(1000, 2000):
        (block,), keys = pool.allocate(1)
        evicted |= {int.from_bytes(key.digest, "big") for key in keys}
        pool.set_key(block, BlockKey(0, number.to_bytes(4, "big")))
        pool.release([block])
    assert set(range(1, 51)) <= evicted


def test_a_growing_sequence_gets_the_block_behind_its_last_one_when_it_is_free() -> None:
    pool = BlockPool(10)
    pool.allocate(9)
    pool.release([3, 7, 8, 4])
    assert pool.allocate(2, after=6)[0] == [7, 8]


def test_thousands_of_hits_leave_the_order_of_eviction_and_no_more_entries_than_blocks() -> None:
    blocks = list(range(1, 25))
    pool = cached_pool(25, blocks)
    touch(pool, blocks)
    for turn in range(1000):
        some = [blocks[(turn + 7 * i) % 24] for i in range(5)]
        touch(pool, some)
        blocks = [block for block in blocks if block not in some] + some
    assert [block for _ in blocks for block in evict(pool, 1)] == blocks


def churned(num_blocks: int, seed: int, turns: int, is_cached: bool) -> float:
    """Returns the share of long sequences' blocks in runs, in a pool nine tenths of which are held
    by sequences of 100 to 32,768 tokens that come, grow block by block, and go."""
    rng, pool, number = random.Random(seed), BlockPool(num_blocks), 0
    live: list[tuple[list[int], int]] = []

    def grow(blocks: list[int], count: int) -> None:
        nonlocal number
        blocks += pool.allocate(count, blocks[-1] if blocks else NULL_BLOCK)[0]
        for block in blocks[-count:] if is_cached else ():
            number += 1
            pool.set_key(block, BlockKey(0, number.to_bytes(8, "big")))

    for _ in range(turns):
        length = int(math.exp(rng.uniform(math.log(100), math.log(32_768)))) // 16
        while pool.num_referenced + length // 2 < 0.9 * num_blocks:
            shared = rng.choice(live)[0] if live and rng.random() < 0.25 else []
            blocks = shared[: min(len(shared) // 2, length // 4)]
            pool.acquire(blocks)
            grow(blocks, length // 2 - len(blocks))
            live.append((blocks, length))
            length = int(math.exp(rng.uniform(math.log(100), math.log(32_768)))) // 16
        for _ in range(64):
            if not live:
                break
            place = rng.randrange(len(live))
            blocks, length = live[place]
            if len(blocks) < length and pool.num_referenced < 0.9 * num_blocks:
                grow(blocks, 1)
            else:
                live[place] = live[-1]
                live.pop()
                pool.release(blocks[::-1])
    pool.check()
    return share_in_runs([np.array(blocks, np.int32) for blocks, _ in live], 16)


@pytest.mark.parametrize("is_cached", [False, True])
def test_long_sequences_lie_in_runs_after_many_came_and_went(is_cached: bool) -> None:
    assert churned(8000, seed=1, turns=400, is_cached=is_cached) > 0.8
