"""How much of the arena is in use, for whom, and how well.

Called when somebody asks for figures, a few times a minute. Never changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.runs import share_in_runs


def group_bytes(manager: KVCacheManager, rows: Sequence[int]) -> list[int]:
    """Returns the bytes of the pages that `rows` hold of each KV group, each page once however many
    share it."""
    layout, pools = manager.layout, manager.pools.pools
    if not rows:
        return [0] * len(manager.tables)
    return [
        table.num_distinct(rows, pools[page_class].num_blocks) * layout.classes[page_class].stride
        for page_class, table in zip(layout.class_of, manager.tables, strict=True)
    ]


def run_share(manager: KVCacheManager) -> float:
    """Returns the share of the blocks of long sequences that lie in runs (see share_in_runs)."""
    rows = (table.row(row) for table in manager.tables for row in range(len(table.lengths)))
    return share_in_runs(rows, manager.block_size)


def waste_share(manager: KVCacheManager, unused_tokens: int) -> float:
    """Returns the share of used slots for tokens that hold none, if so many of every group's do."""
    class_of = manager.layout.class_of
    tokens = [place for place, group in enumerate(manager.groups) if not group.is_state]
    pools = {class_of[place] for place in tokens}
    pages = sum(manager.pools.pools[one].num_referenced for one in pools)
    slots = pages * manager.block_size
    return len(tokens) * unused_tokens / slots if slots else 0.0
