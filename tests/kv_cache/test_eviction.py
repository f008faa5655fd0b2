"""The order of eviction against a plain list of what is in it, and what it learns."""

from __future__ import annotations

import hashlib
import random
from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.formats import kv_format
from octavo.kv_cache.eviction import EvictionOrder
from octavo.kv_cache.hash_memory import HashMemory, hash_of
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.records import SequenceKV
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.kv_cache.trial import NUM_CLASSES, ORDERS, Trial

NUM_BLOCKS = 40


def ids(blocks: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(blocks, np.int32)


@settings(deadline=None)
@given(st.data())
def test_while_uses_tell_nothing_that_goes_first_which_came_first(data: st.DataObject) -> None:
    order = EvictionOrder(NUM_BLOCKS)
    stored: set[int] = set()
    inside: list[int] = []
    for number in range(data.draw(st.integers(1, 30))):
        out = [block for block in range(NUM_BLOCKS) if block not in inside]
        what = data.draw(st.sampled_from(["append", "use", "evict"]))
        if what == "append" and out:
            blocks = data.draw(st.lists(st.sampled_from(out), min_size=1, unique=True))
            for block in blocks:
                if block not in stored:
                    order.stored(block, f"{number} {block}".encode() * 4, 0)
                    stored.add(block)
            order.append(ids(blocks))
            inside += blocks
        elif what == "use" and inside:
            blocks = data.draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))
            order.asked_for(ids(blocks))
            order.remove(ids(blocks))
            inside = [block for block in inside if block not in blocks]
        elif what == "evict" and inside:
            found = order.next(data.draw(st.integers(1, 10))).tolist()
            assert found == inside[: len(found)]
            order.evict(ids(found), [f"{number} {block}".encode() * 4 for block in found])
            inside = inside[len(found) :]
            stored -= set(found)
        assert len(order) == len(inside)
        assert sorted(order.all().tolist()) == sorted(inside)
        assert [block in order for block in range(NUM_BLOCKS)] == [
            block in inside for block in range(NUM_BLOCKS)
        ]
    assert sorted(order.clear().tolist()) == sorted(inside)
    assert not len(order)


class Cache:
    """Serves one prompt after the other, each the names of its blocks; LRU beside it."""

    def __init__(self, num_blocks: int) -> None:
        self.order = EvictionOrder(num_blocks + 1)
        self.free = list(range(num_blocks, 0, -1))
        self.block_of: dict[str, int] = {}
        self.num_blocks = num_blocks
        self.lru: list[str] = []
        self.weights: tuple[float, ...] | None = None
        """An order that holds whatever the trial found."""

    def ask(self, prompt: list[str]) -> tuple[int, int]:
        """Returns how many of its blocks were here, and would have been here with LRU."""
        block_of, order = self.block_of, self.order
        hits = next((i for i, name in enumerate(prompt) if name not in block_of), len(prompt))
        held = [block_of[name] for name in prompt[:hits]]
        order.asked_for(ids(held))
        order.remove(ids(held))
        while len(self.free) < len(prompt) - hits:
            if self.weights is not None:
                order.weigh(self.weights)
            gone = order.next(len(prompt) - hits - len(self.free)).tolist()
            names = {block: name for name, block in block_of.items()}
            order.evict(ids(gone), [digest_of(names[block]) for block in gone])
            for block in gone:
                del block_of[names[block]]
            self.free += gone
        for name in prompt[hits:]:
            block_of[name] = block = self.free.pop()
            order.stored(block, digest_of(name), held[-1] if held else 0)
            held.append(block)
        order.append(ids(held[::-1]))
        self.check()
        by_age = next((i for i, name in enumerate(prompt) if name not in self.lru), len(prompt))
        self.lru = [name for name in self.lru if name not in prompt] + prompt[::-1]
        self.lru = self.lru[-self.num_blocks :]
        return hits, by_age

    def check(self) -> None:
        """Whatever is here can be found: all that stands before it is here too."""
        for name in self.block_of:
            parent, _, _ = name.rpartition("/")
            assert not parent or parent in self.block_of, f"{name} without what is before it"


def digest_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def document(name: str, length: int = 8) -> list[str]:
    return ["/".join([name] * (place + 1)) for place in range(length)]


def share_of_hits(cache: Cache, prompts: list[list[str]]) -> tuple[float, float]:
    pairs = [cache.ask(prompt) for prompt in prompts]
    total = sum(map(len, prompts))
    return sum(ours for ours, _ in pairs) / total, sum(by_age for _, by_age in pairs) / total


def hot_beside_a_scan(draw: random.Random, name: str, count: int) -> list[list[str]]:
    """Every fifth prompt is one of a few, the others come once."""
    return [
        document(f"{name}{draw.randrange(12)}" if i % 5 == 0 else f"{name}once{i}")
        for i in range(count)
    ]


def test_a_scan_does_not_drive_out_what_is_asked_for_again_and_what_is_dead_goes() -> None:
    draw = random.Random(0)
    cache = Cache(256)
    share_of_hits(cache, hot_beside_a_scan(draw, "a", 400))
    ours, by_age = share_of_hits(cache, hot_beside_a_scan(draw, "a", 200))
    assert ours > 0.19 > by_age + 0.05
    share_of_hits(cache, hot_beside_a_scan(draw, "b", 200))
    assert not any(name.startswith("a") for name in cache.block_of), "what was hot stays for ever"
    ours, by_age = share_of_hits(cache, hot_beside_a_scan(draw, "b", 400))
    assert ours > by_age + 0.05


def test_where_conversations_grow_and_end_the_oldest_go() -> None:
    draw = random.Random(1)
    cache, talks, count = Cache(256), [], 0
    prompts: list[list[str]] = []
    for _ in range(600):
        while len(talks) < 20:
            talks.append((f"{count}", 2))
            count += 1
        name, length = talks.pop(min(int(draw.expovariate(1 / 4)), 19))
        prompts.append(document(name, length))
        if length < 24 and draw.random() < 0.85:
            talks.insert(0, (name, length + 2))
    ours, by_age = share_of_hits(cache, prompts)
    assert ours >= by_age - 0.01


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(20, 80))
def test_whatever_is_asked_for_what_is_cached_can_be_found(seed: int, num_blocks: int) -> None:
    """Leaves go first, in every order that is tried; `Cache` looks after each prompt."""
    draw = random.Random(seed)
    cache = Cache(num_blocks)
    roots = [f"{i}" for i in range(6)]
    for number in range(150):
        if number % 50 == 0:
            draw.shuffle(roots)
        root = roots[min(int(draw.expovariate(0.7)), 5)]
        prompt = document(root, draw.randrange(1, 5))
        for _ in range(draw.randrange(10)):
            prompt.append(f"{prompt[-1]}/{draw.randrange(3)}")
        cache.ask(prompt)
        if number % 30 == 0:
            cache.weights = draw.choice((None, *ORDERS))
        assert len(cache.block_of) + len(cache.free) == num_blocks
        assert len(cache.order) == len(cache.block_of)


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
    others = list(range(10, NUM_BLOCKS - 1))
    for block in others:
        order.stored(block, hashlib.sha256(bytes([block])).digest(), 0)
    order.append(ids(others))
    evicted = [block for _ in range(len(order)) for block in evict_one(order)]
    assert evicted[:2] == [3, 5]
    assert evicted.index(4) > 2


def evict_one(order: EvictionOrder) -> list[int]:
    order.weigh(ORDERS[-1])
    found = order.next(1)
    order.evict(found, [bytes(32)] * len(found))
    return found.tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, NUM_CLASSES - 1))))
def test_a_trial_is_bounded_and_age_alone_is_lru(pairs: list[tuple[int, int]]) -> None:
    trial = Trial(NUM_BLOCKS)
    by_age: list[int] = []
    for time, (hash_, class_) in enumerate(pairs):
        trial.asked_for([hash_])
        trial.given_back(hash_, class_, time)
        trial.evicted(1)
        by_age = [*(one for one in by_age if one != hash_), hash_][-NUM_BLOCKS:]
        assert all(len(cache) <= NUM_BLOCKS for cache in trial.caches)
        assert all((one in trial.caches[0]) == (one in by_age) for one in range(301))
    trial.clear()
    assert not any(len(cache) for cache in trial.caches)
    assert trial.order == ORDERS[0]


def test_a_trial_of_a_large_cache_looks_at_few_blocks() -> None:
    mask = Trial(1 << 20).sample_mask
    assert 32 < sum(not hash_of(digest_of(str(i))) & mask for i in range(4096)) < 128
    assert not Trial(500).sample_mask


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))))
def test_what_is_remembered_is_what_was_put_last(pairs: list[tuple[int, int]]) -> None:
    memory = HashMemory(8)
    for hash_, number in pairs:
        memory.pop(hash_)
        memory.add(hash_, number)
        assert memory.get(hash_) == number
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


def test_a_hit_is_one_use() -> None:
    spec = attention_kv(1, 1, kv_format("float32"))
    manager = KVCacheManager(
        group_layers((spec,)), num_chunks=65, block_size=16, max_rows=1, max_model_len=1024
    )
    ids = array("i", range(16 * 6))
    for asked in range(1, 5):
        kv = SequenceKV(root=bytes(32))
        hit = manager.lookup(kv, ids)
        assert hit.num_blocks == (5 if asked > 1 else 0)
        assert manager.admit(kv, 0, hit, len(ids))
        manager.publish(kv, ids, len(ids))
        blocks = manager.tables[0].row(0)
        assert manager.pools.pools[0].num_uses(blocks[:5]).tolist() == [asked] * 5
        assert [manager.pools.pools[0].ref_count(block) for block in blocks.tolist()] == [1] * 6
        manager.check((0,))
        manager.release([kv])
        manager.check(())


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_is_stored_at_once_is_what_is_stored_in_turn(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=30))
    evicted = data.draw(st.sets(st.sampled_from(names)))
    digests = [digest_of(str(name)) for name in names]
    orders = EvictionOrder(NUM_BLOCKS), EvictionOrder(NUM_BLOCKS)
    blocks = list(range(1, len(names) + 1))
    parents = [0, *blocks[:-1]]
    for order in orders:
        for block, name in enumerate(evicted, start=1):
            order.stored(block, digest_of(str(name)), 0)
        held = ids(list(range(1, len(evicted) + 1)))
        order.append(held)
        order.evict(held, [digest_of(str(name)) for name in evicted])
    for block, digest, parent in zip(blocks, digests, parents, strict=True):
        orders[0].stored(block, digest, parent)
    orders[1].stored_all(blocks, digests, parents)
    for order in orders:
        order.append(ids(blocks[::-1]))
    for _ in blocks:
        assert evict_one(orders[0]) == evict_one(orders[1])
