"""The arena: the memory of all KV blocks, and each layer's view of it.

Made by the runner's builder, read and written by ops. The only file of `kv_cache` with tensors;
it never knows who holds a block.

    arena        [num_blocks, page_bytes] uint8; a block id is a row, whatever group it serves
    group's view [num_blocks, num_slots, 2, block_size, num_kv_heads, head_size]
    layer's view group's view at its slot: keys at 0, values at 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.kernels.inputs import KVLayer
from octavo.kernels.weights import torch_dtype
from octavo.kv_cache.spec import KVGroup


class KVStorage:
    """Owns the arena. On a CPU its memory is taken only when a page is first written."""

    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        num_blocks: int,
        block_size: int,
        device: torch.device | None = None,
    ) -> None:
        sizes = {group.page_bytes(block_size) for group in groups}
        if len(sizes) != 1:
            raise ValueError(f"all KV groups need pages of one size, got {sorted(sizes)}")
        self.groups = groups
        self.block_size = block_size
        self._page_bytes = sizes.pop()
        self._layers: dict[int, KVLayer] = {}
        self._group_of: dict[int, int] = {}
        self.arena = torch.empty(0, dtype=torch.uint8, device=device)
        self.allocate(num_blocks)

    def allocate(self, num_blocks: int) -> None:
        """Makes the arena anew, of so many blocks; what was in it is gone."""
        device, self.num_blocks = self.arena.device, num_blocks
        del self.arena
        self._layers.clear()
        # empty, not zeros: untouched pages stay unmapped, so a large cache costs nothing at start
        self.arena = torch.empty(num_blocks, self._page_bytes, dtype=torch.uint8, device=device)
        for index, group in enumerate(self.groups):
            self._add_group(index, group)

    def _add_group(self, index: int, group: KVGroup) -> None:
        spec = group.spec
        view = self.arena.view(torch_dtype(spec.format.name)).view(
            self.num_blocks,
            group.num_slots,
            2,
            self.block_size,
            spec.num_kv_heads,
            spec.head_size,
        )
        for slot, layer in enumerate(group.layers):
            self._layers[layer] = KVLayer(key=view[:, slot, 0], value=view[:, slot, 1])
            self._group_of[layer] = index

    def layer(self, index: int) -> KVLayer:
        """Returns the keys and values of model layer `index`."""
        return self._layers[index]

    def group_of(self, index: int) -> int:
        """Returns which group (and block table) model layer `index` belongs to."""
        return self._group_of[index]

    def poison(self, blocks: Sequence[int]) -> None:
        """Fills blocks with NaN (all bits set, in every KV format), so that tests see a read of
        memory that nobody wrote."""
        if len(blocks):
            self.arena[torch.as_tensor(blocks, device=self.arena.device)] = 0xFF
