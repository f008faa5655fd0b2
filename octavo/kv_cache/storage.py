"""The arena: the memory of all KV blocks, and each layer's view of it.

Made by the runner's builder, read and written by ops. The only file of `kv_cache` with tensors;
it never knows who holds a block.

    arena        [bytes] uint8
    pages        [num_pages, stride] of a page class (`layout`); a page's id is a row
    layer's view the planes of its slot by name, each [num_pages, block_size, *shape of a token];
                 int4 in bytes, [..., shape[-1] / 2]; no block_size in one that is not per token
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from octavo.kernels.inputs import KVLayer
from octavo.kernels.ops import Ops
from octavo.kernels.weights import torch_dtype
from octavo.kv_cache.layout import arena_layout
from octavo.kv_cache.spec import KVGroup, Plane
from octavo.step import Page, PageCopy


class KVStorage:
    """Owns the arena. On a CPU its memory is taken only when a page is first written."""

    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        num_chunks: int,
        block_size: int,
        device: torch.device | None = None,
    ) -> None:
        """`num_chunks` of `arena_layout(groups)`: pages, where all groups' have one size."""
        self.groups = groups
        self.block_size = block_size
        self.layout = arena_layout(groups, block_size)
        self._layers: dict[int, KVLayer] = {}
        self._group_of: dict[int, int] = {}
        self.arena = torch.empty(0, dtype=torch.uint8, device=device)
        self.allocate(num_chunks)

    def allocate(self, num_chunks: int) -> None:
        """Makes the arena anew, of so many chunks; what was in it is gone."""
        device, self.num_chunks = self.arena.device, num_chunks
        del self.arena
        self._layers.clear()
        # empty, not zeros: untouched pages stay unmapped, so a large cache costs nothing at start
        size = num_chunks * self.layout.chunk_bytes
        self.arena = torch.empty(size, dtype=torch.uint8, device=device)
        for index, group in enumerate(self.groups):
            self._add_group(index, group)

    def _add_group(self, index: int, group: KVGroup) -> None:
        page_class = self.layout.class_of[index]
        *offsets, slot_bytes = group.spec.offsets(self.block_size)
        for slot, layer in enumerate(group.layers):
            planes = {
                plane.name: self._plane(page_class, plane, slot * slot_bytes + offset)
                for plane, offset in zip(group.spec.planes, offsets, strict=True)
            }
            self._layers[layer] = KVLayer(**planes)
            self._group_of[layer] = index

    def pages(self, page_class: int) -> Tensor:
        """Returns [num_pages, stride] uint8: the pages of a class, whoever has their chunks."""
        return self.arena.view(-1, self.layout.classes[page_class].stride)

    def _plane(self, page_class: int, plane: Plane, offset: int) -> Tensor:
        """Returns the view of a plane that begins `offset` bytes behind the start of each page."""
        shape = (self.block_size, *plane.shape) if plane.is_per_token else plane.shape
        if plane.bits < 8:
            shape = (*shape[:-1], shape[-1] * plane.bits // 8)
        flat, pages = self.arena.view(_dtype(plane)), self.pages(page_class)
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        size = flat.element_size()
        return flat.as_strided(
            (len(pages), *shape), (pages.shape[1] // size, *strides), offset // size
        )

    def layer(self, index: int) -> KVLayer:
        """Returns the planes of model layer `index`."""
        return self._layers[index]

    def group_of(self, index: int) -> int:
        """Returns which group (and block table) model layer `index` belongs to."""
        return self._group_of[index]

    def copy(self, copies: Sequence[PageCopy], ops: Ops) -> None:
        """Copies pages, in the order given."""
        for page_class in dict.fromkeys(one.page_class for one in copies):
            pairs = [(one.source, one.target) for one in copies if one.page_class == page_class]
            ops.copy_blocks(self.pages(page_class), pairs)

    def poison(self, pages: Sequence[Page]) -> None:
        """Sets all bits of pages, so that tests see a read of memory that nobody wrote: they are
        NaN in every float format, and in the scales without which integers mean nothing."""
        for page_class in dict.fromkeys(one.page_class for one in pages):
            blocks = [one.block for one in pages if one.page_class == page_class]
            self.pages(page_class)[torch.as_tensor(blocks, device=self.arena.device)] = 0xFF


def _dtype(plane: Plane) -> torch.dtype:
    short = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
    return short[plane.number] if plane.number in short else torch_dtype(plane.number)
