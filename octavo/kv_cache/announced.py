"""Which blocks of prompts running sequences compute next: whoever needs the same waits for them.

Owned by the KV cache manager. Never looks at a page.
"""

from __future__ import annotations

from octavo.kv_cache.records import SequenceKV


class Announced:
    """Digests of blocks, with how many compute each."""

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._counts

    def announce(self, kv: SequenceKV) -> None:
        """Tells others which block `kv` computes next, if it is one of its prompt."""
        if kv.computing is not None:
            self.retract(kv)
        if kv.writes_cache and kv.num_published < min(kv.prompt_blocks, len(kv.digests)):
            digest = kv.digests[kv.num_published]
            kv.computing = digest
            self._counts[digest] = self._counts.get(digest, 0) + 1

    def retract(self, kv: SequenceKV) -> None:
        """It computes it no more, or has."""
        if kv.computing is None:
            return
        count = self._counts.pop(kv.computing) - 1
        if count:
            self._counts[kv.computing] = count
        kv.computing = None
