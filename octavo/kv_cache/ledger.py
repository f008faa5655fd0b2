"""What the KV groups share: pools of pages, prefix index, and what a step must do to memory.

Made by the KV cache manager, called by its groups. Never knows rows or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

from octavo.kv_cache.block_pool import NULL_BLOCK, BlockKey, BlockPool, Blocks
from octavo.kv_cache.layout import ArenaLayout
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.page_pools import PagePools
from octavo.kv_cache.prefix_index import PrefixIndex
from octavo.step import Int32, Page, PageCopy

_MANY = 16
"""Pages from which on they are published at once: arrays for fewer would take longer."""


class PageLedger:
    """Every page that changes hands does so here. Callers name groups, plans name page classes."""

    def __init__(
        self, layout: ArenaLayout, num_chunks: int, *, poison: bool, news: CacheNews | None = None
    ) -> None:
        """`news` is told what can be found, and what no more."""
        self._news = news
        self.pools = PagePools(layout, num_chunks)
        self.index = PrefixIndex(len(layout.class_of))
        self._class_of = layout.class_of
        self._poison = poison
        self._copies: list[PageCopy] = []
        self._saves: list[PageCopy] = []
        self._pinned: list[Page] = []
        self._emptied: list[Page] = []

    def pool(self, group: int) -> BlockPool:
        return self.pools.pools[self._class_of[group]]

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """The pages of these keys hold something else from now on."""
        for key in keys:
            self.index.remove(key)
            if self._news is not None:
                self._news.remove(key)

    def take(self, group: int, count: int, after: int = NULL_BLOCK) -> list[int]:
        """Returns `count` pages with one reference each; they must have been reserved."""
        pages, evicted = self.pool(group).allocate(count, after)
        self.forget(evicted)
        self._empty(group, pages)
        return pages

    def take_each(self, group: int, after: Int32) -> Int32:
        """Returns a page with one reference for each of `after`, if it may be the one behind it;
        they must have been reserved."""
        pages, evicted = self.pool(group).allocate_each(after)
        self.forget(evicted)
        self._empty(group, pages.tolist())
        return pages

    def acquire(self, group: int, pages: Blocks, *, is_hit: bool = True) -> None:
        """Adds a reference to pages; `is_hit`: for somebody who came back for what they hold."""
        self.pool(group).acquire(pages, is_hit=is_hit)

    def release(self, group: int, pages: Blocks) -> None:
        """Takes a reference from each; give a sequence's pages last first."""
        self._empty(group, self.pool(group).release(pages))

    def publish(
        self, key: BlockKey, page: int, content: int, root: bytes, parent: int = NULL_BLOCK
    ) -> None:
        """Makes a page findable, unless it is, or another one of its key is; `parent` is the page
        before it."""
        pool = self.pool(key.group)
        if pool.key(page) is None and self.index.insert(key, page, content, root):
            pool.set_key(page, key, parent)
            if self._news is not None:
                self._news.insert(key)

    def publish_all(
        self, keys: list[BlockKey], pages: list[int], contents: list[int], root: bytes, parent: int
    ) -> None:
        """As `publish` of pages of one group that follow each other, `parent` before the first;
        null pages are left out."""
        if len(pages) < _MANY:
            for key, page, content in zip(keys, pages, contents, strict=True):
                if page != NULL_BLOCK:
                    self.publish(key, page, content, root, parent)
                parent = page
            return
        pool, insert = self.pool(keys[0].group), self.index.insert
        news = None if self._news is None else self._news.insert
        places: list[int] = []
        for place, page in enumerate(pages):
            is_new = page != NULL_BLOCK and pool.key(page) is None
            if is_new and insert(keys[place], page, contents[place], root):
                places.append(place)
                if news is not None:
                    news(keys[place])
        if places:
            before = [parent, *pages]
            pool.set_keys(
                [pages[place] for place in places],
                [keys[place] for place in places],
                [before[place] for place in places],
            )

    def copy(self, group: int, source: int, target: int) -> None:
        """Copies a page before the next step; its content is kept until then."""
        page_class = self._class_of[group]
        self.acquire(group, (source,), is_hit=False)
        self._pinned.append(Page(page_class, source))
        self._copies.append(PageCopy(page_class, source, target))

    def save(self, group: int, source: int, target: int) -> None:
        """Copies a page after the next step."""
        self._saves.append(PageCopy(self._class_of[group], source, target))

    def _empty(self, group: int, pages: Iterable[int]) -> None:
        if self._poison:
            page_class = self._class_of[group]
            self._emptied += [Page(page_class, page) for page in pages]

    def reset(self) -> None:
        """Forgets every prefix; nobody holds a page."""
        self.index.clear()
        if self._news is not None:
            self._news.clear()
        for page_class, pool in enumerate(self.pools.pools):
            emptied = pool.forget_keys()
            if self._poison:
                self._emptied += [Page(page_class, page) for page in emptied]

    # -- for the next step plan --------------------------------------------------------------

    def take_copies(self) -> tuple[PageCopy, ...]:
        copies, self._copies = tuple(self._copies), []
        pinned, self._pinned = self._pinned, []
        for page in pinned:
            emptied = self.pools.pools[page.page_class].release((page.block,))
            if self._poison:
                self._emptied += [Page(page.page_class, one) for one in emptied]
        return copies

    def take_saves(self) -> tuple[PageCopy, ...]:
        saves, self._saves = tuple(self._saves), []
        return saves

    def take_emptied(self) -> tuple[Page, ...]:
        """Returns pages whose content nobody may read any more (test mode only). What a step copies
        is emptied after it: take the copies later."""
        emptied, self._emptied = tuple(self._emptied), []
        return emptied
