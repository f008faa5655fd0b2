"""What a journal tells adds up to what the index holds."""

from __future__ import annotations

import random
from array import array

from octavo.formats import kv_format
from octavo.kv_cache.hash_memory import hash_of
from octavo.kv_cache.journal import Journal, widest_group
from octavo.kv_cache.manager import KVCacheManager, SequenceKV
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.visibility import Window


def test_what_is_told_adds_up_to_the_widest_group() -> None:
    rng = random.Random(1)
    specs = (
        attention_kv(1, 1, kv_format("float32"), visibility=Window(32)),
        attention_kv(1, 1, kv_format("float32")),
    )
    groups = group_layers(specs)
    news, journal = CacheNews(range(2), 16), Journal(widest_group(groups))
    manager = KVCacheManager(
        groups, num_chunks=40, block_size=16, max_rows=1, max_model_len=160, news=news
    )
    (widest,) = [i for i, one in enumerate(groups) if one.spec.visibility.most_visible is None]
    known: set[int] = set()
    for step in range(60):
        if step == 40:
            assert manager.reset_prefix_cache()
        start = [rng.randrange(3)] * 64
        ids = array("i", start + [rng.randrange(5)] * 40)
        kv = SequenceKV(root=bytes(32))
        hit = manager.lookup(kv, ids)
        assert manager.admit(kv, 0, hit, len(ids))
        manager.publish(kv, ids, len(ids))
        manager.release([kv])
        journal.note(news.take())
        changes = journal.take()
        if changes is not None:
            known = set() if changes.is_cleared else known
            known -= set(array("Q", changes.removed))
            known |= set(array("Q", changes.stored))
        held = {hash_of(key.digest) for key, _ in manager.index.items() if key.group == widest}
        assert known == held
        assert journal.take() is None
