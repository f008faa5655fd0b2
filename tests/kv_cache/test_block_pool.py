"""The block pool under random driving: no block is lost, none is handed out twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey, BlockPool

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Keeps its own count of every reference and compares after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[int] = []
        self.keys: dict[BlockKey, int] = {}
        self.cached: list[int] = []
        """Keyed and held by nobody, oldest first."""
        self.next_key = 0

    @rule(count=st.integers(0, 5), after=st.integers(0, NUM_BLOCKS - 1))
    def allocate(self, count: int, after: int) -> None:
        if count > self.pool.num_free:
            return
        blocks, evicted = self.pool.allocate(count, after)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.held), "a held block was handed out"
        taken = [self.keys.pop(key) for key in evicted]
        assert taken == self.cached[: len(taken)], "evicted out of order"
        assert blocks[count - len(taken) :] == taken
        del self.cached[: len(taken)]
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held), min_size=1, unique=True))
        for block in blocks:
            self.held.remove(block)
        freed = [block for block in blocks if block not in self.held]
        self.cached += [block for block in freed if block in self.keys.values()]
        empty = [block for block in freed if block not in self.keys.values()]
        assert self.pool.release(blocks) == empty

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
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
        self.held += blocks

    @rule()
    def forget_keys(self) -> None:
        assert self.pool.forget_keys() == self.cached
        self.keys.clear()
        self.cached.clear()

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        for block in range(1, NUM_BLOCKS):
            assert self.pool.ref_count(block) == self.held.count(block)
        assert self.pool.num_referenced == len(set(self.held))
        assert set(self.cached) == set(self.keys.values()) - set(self.held)
        assert self.pool.num_cached == len(self.cached)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_blocks_without_a_prefix_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    blocks, _ = pool.allocate(3)
    pool.set_key(blocks[0], BlockKey(0, b"a"))
    pool.release(blocks)
    again, evicted = pool.allocate(2)
    assert set(again) == set(blocks[1:])
    assert evicted == []


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(4)
    blocks, _ = pool.allocate(3)
    for block in blocks:
        pool.set_key(block, BlockKey(0, bytes([block])))
    pool.release([blocks[2]])
    pool.release([blocks[0], blocks[1]])
    pool.acquire([blocks[2]])
    pool.release([blocks[2]])
    _, evicted = pool.allocate(3)
    assert evicted == [BlockKey(0, bytes([b])) for b in (blocks[0], blocks[1], blocks[2])]


def test_a_growing_sequence_gets_the_block_behind_its_last_one_when_it_is_free() -> None:
    pool = BlockPool(10)
    pool.allocate(9)
    pool.release([3, 7, 8, 4])
    assert pool.allocate(2, after=6)[0] == [7, 8]


def test_thousands_of_hits_leave_the_order_of_eviction_and_no_more_entries_than_blocks() -> None:
    pool = BlockPool(100)
    blocks, _ = pool.allocate(99)
    for block in blocks:
        pool.set_key(block, BlockKey(0, bytes([block])))
    pool.release(blocks)
    for turn in range(1000):
        some = [blocks[(turn + 7 * i) % 99] for i in range(10)]
        pool.acquire(some)
        pool.release(some)
        blocks = [block for block in blocks if block not in some] + some
    _, evicted = pool.allocate(99)
    assert [key.digest[0] for key in evicted] == blocks
