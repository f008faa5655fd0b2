"""How much of the arena rows hold: pages that they refer to, each once however many share it.

Called when somebody asks for figures, a few times a minute. Never changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.kv_cache.manager import KVCacheManager


def group_bytes(manager: KVCacheManager, rows: Sequence[int]) -> list[int]:
    """Returns the bytes of the pages that `rows` hold of each KV group."""
    layout, pools = manager.layout, manager.pools.pools
    if not rows:
        return [0] * len(manager.tables)
    return [
        table.num_distinct(rows, pools[page_class].num_blocks) * layout.classes[page_class].stride
        for page_class, table in zip(layout.class_of, manager.tables, strict=True)
    ]
