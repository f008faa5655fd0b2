"""What the KV cache of one layer is made of and who can still see it. No torch.

The models declare one KVSpec per layer; equal specs form KV groups, whose pages are cut from one
arena. Read by the planner, the manager and the storage.

A page holds, for each of its group's layer slots, the planes of the spec one after the other:

    page = [slot 0: key | value | key_scale ...][slot 1: ...]

All groups draw equal-sized pages from one pool, so every group has the same number of layer slots;
a kind of layer that is more numerous is split into several groups, the last one padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from octavo.formats import KVFormat
from octavo.visibility import Full, Visibility

ALIGNMENT = 16
"""Bytes: where a plane may begin, so that it can be read in the widest loads and by TMA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One named array of a page: `shape` numbers a token, or a page if `is_per_token` is false."""

    name: str
    shape: tuple[int, ...]
    number: str
    """Name of the number format (`KVFormat.name`)."""
    bits: int
    """Of one number."""
    is_per_token: bool = True

    @property
    def width(self) -> int:
        """Numbers of a token, or of a page if not per token."""
        return prod(self.shape)

    def page_bytes(self, block_size: int) -> int:
        """Returns the bytes of a page of `block_size` tokens in one layer."""
        tokens = block_size if self.is_per_token else 1
        return -(-tokens * self.width * self.bits // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """What one layer keeps of its tokens, and for how long."""

    planes: tuple[Plane, ...]
    visibility: Visibility = Full()

    @property
    def token_bytes(self) -> int:
        """Bytes of all planes for one token in one layer."""
        return sum(plane.page_bytes(1) for plane in self.planes if plane.is_per_token)

    @property
    def formats(self) -> str:
        """Number formats of the planes, scales left out: "bfloat16", or "int8/int4" where they
        differ."""
        names = (plane.number for plane in self.planes if not plane.name.endswith("_scale"))
        return "/".join(dict.fromkeys(names))

    @property
    def identity(self) -> str:
        """All that decides what the bytes of a page mean: two specs share pages only if equal."""
        planes = (f"{p.name}:{p.number}{list(p.shape)}" for p in self.planes)
        return f"{self.visibility}({', '.join(planes)})"

    def offsets(self, block_size: int) -> tuple[int, ...]:
        """Returns where each plane begins in a layer's slot of a page, and the slot's end."""
        found = [0]
        for plane in self.planes:
            end = found[-1] + plane.page_bytes(block_size)
            found.append(-(-end // ALIGNMENT) * ALIGNMENT)
        return tuple(found)


def attention_kv(
    num_kv_heads: int,
    head_size: int,
    format: KVFormat,
    *,
    value_format: KVFormat | None = None,
    visibility: Visibility = Full(),
) -> KVSpec:
    """Returns the spec of attention with keys and values of `head_size` numbers a head; planes
    "key", "value" [heads, head size], and for formats with scales "key_scale", "value_scale"
    [heads, scales]."""
    planes, scales = [], []
    for name, one in (("key", format), ("value", value_format or format)):
        shape = (num_kv_heads, head_size)
        planes.append(Plane(name=name, shape=shape, number=one.name, bits=one.bits))
        if num_scales := one.num_scales(head_size):
            shape = (num_kv_heads, num_scales)
            scales.append(Plane(name=f"{name}_scale", shape=shape, number="float16", bits=16))
    return KVSpec(planes=(*planes, *scales), visibility=visibility)


def latent_kv(num_columns: int, format: KVFormat, *, visibility: Visibility = Full()) -> KVSpec:
    """Returns the spec of latent attention: one plane "latent" of `num_columns` (rank and rotary
    columns), and for formats with scales "latent_scale"."""
    planes = [Plane(name="latent", shape=(num_columns,), number=format.name, bits=format.bits)]
    if num_scales := format.num_scales(num_columns):
        planes.append(Plane(name="latent_scale", shape=(num_scales,), number="float16", bits=16))
    return KVSpec(planes=tuple(planes), visibility=visibility)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share block tables: layer `layers[i]` lives in slot i of the group's pages."""

    spec: KVSpec
    layers: tuple[int, ...]
    num_slots: int
    """Layer slots in a page; slots beyond len(layers) are padding."""

    def page_bytes(self, block_size: int) -> int:
        return self.num_slots * self.spec.offsets(block_size)[-1]


def group_layers(specs: tuple[KVSpec, ...]) -> tuple[KVGroup, ...]:
    """Returns the KV groups of a model with one spec per layer, in order of first layer.

    The number of slots is the one that wastes the fewest padded slots; among equals, the largest
    (fewer groups, fewer tables). Specs must have equal `token_bytes`.
    """
    kinds: dict[KVSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        kinds.setdefault(spec, []).append(layer)
    if len({spec.token_bytes for spec in kinds}) > 1:
        raise ValueError("layers with different KV bytes per token cannot share one pool yet")
    counts = [len(layers) for layers in kinds.values()]

    def padding(slots: int) -> int:
        return sum(-count % slots for count in counts)

    num_slots = min(range(1, max(counts) + 1), key=lambda slots: (padding(slots), -slots))
    return tuple(
        KVGroup(spec=spec, layers=tuple(layers[i : i + num_slots]), num_slots=num_slots)
        for spec, layers in kinds.items()
        for i in range(0, len(layers), num_slots)
    )
