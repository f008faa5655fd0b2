"""The arena: the memory of all KV blocks, and each layer's view of it.

Made by the runner's builder, read and written by ops. The only file of `kv_cache` with tensors;
it never knows who holds a block.

    arena        [num_blocks, page_bytes] uint8; a block id is a row, whatever group it serves
    layer's view the planes of its slot by name, each [num_blocks, block_size, *shape of a token];
                 int4 in bytes, [..., shape[-1] / 2]; no block_size in one that is not per token
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from octavo.kernels.inputs import KVLayer
from octavo.kernels.weights import torch_dtype
from octavo.kv_cache.spec import KVGroup, Plane


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
        *offsets, slot_bytes = group.spec.offsets(self.block_size)
        for slot, layer in enumerate(group.layers):
            planes = {
                plane.name: self._plane(plane, slot * slot_bytes + offset)
                for plane, offset in zip(group.spec.planes, offsets, strict=True)
            }
            self._layers[layer] = KVLayer(**planes)
            self._group_of[layer] = index

    def _plane(self, plane: Plane, offset: int) -> Tensor:
        """Returns the view of a plane that begins `offset` bytes behind the start of each page."""
        shape = (self.block_size, *plane.shape) if plane.is_per_token else plane.shape
        if plane.bits < 8:
            shape = (*shape[:-1], shape[-1] * plane.bits // 8)
        flat = self.arena.view(-1).view(_dtype(plane))
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        size = flat.element_size()
        return flat.as_strided(
            (self.num_blocks, *shape), (self._page_bytes // size, *strides), offset // size
        )

    def layer(self, index: int) -> KVLayer:
        """Returns the planes of model layer `index`."""
        return self._layers[index]

    def group_of(self, index: int) -> int:
        """Returns which group (and block table) model layer `index` belongs to."""
        return self._group_of[index]

    def poison(self, blocks: Sequence[int]) -> None:
        """Sets all bits of blocks, so that tests see a read of memory that nobody wrote: they are
        NaN in every float format, and in the scales without which integers mean nothing."""
        if len(blocks):
            self.arena[torch.as_tensor(blocks, device=self.arena.device)] = 0xFF


def _dtype(plane: Plane) -> torch.dtype:
    short = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
    return short[plane.number] if plane.number in short else torch_dtype(plane.number)
