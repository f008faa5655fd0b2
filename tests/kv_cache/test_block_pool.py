"""The block pool under random driving: no block is lost, none is handed out twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.kv_cache.block_pool import BlockKey, BlockPool

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Keeps its own count of every reference and compares after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[int] = []
        self.keys: dict[BlockKey, int] = {}
        self.next_key = 0

    @rule(count=st.integers(0, 5), after=st.integers(0, NUM_BLOCKS - 1))
    def allocate(self, count: int, after: int) -> None:
        if count > self.pool.num_free:
            return
        blocks, evicted = self.pool.allocate(count, after)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.held), "a held block was handed out"
        for key in evicted:
            assert self.keys.pop(key) in blocks
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        emptied = self.pool.release([block])
        is_empty = block not in self.held and block not in self.keys.values()
        assert emptied == ([block] if is_empty else [])

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
        block = data.draw(st.sampled_from(sorted(self.keys.values())))
        self.pool.acquire([block])
        self.held.append(block)

    @rule()
    def forget_keys(self) -> None:
        cached = set(self.keys.values()) - set(self.held)
        assert set(self.pool.forget_keys()) == cached
        self.keys.clear()

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        for block in range(1, NUM_BLOCKS):
            assert self.pool.ref_count(block) == self.held.count(block)
        assert self.pool.num_referenced == len(set(self.held))
        assert self.pool.num_cached == len(set(self.keys.values()) - set(self.held))


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
