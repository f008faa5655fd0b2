"""What the KV cache of one layer is made of and who can still see it. No torch.

The models declare one KVSpec per layer; equal specs form KV groups, whose pages are cut from one
arena. Read by the planner, the manager and the storage.

A page holds, for each of its group's layer slots, the planes of the spec one after the other:

    page = [slot 0: key | value | key_scale ...][slot 1: ...]

A kind of layer that is more numerous than a page has slots is split into several groups, the last
one padded. Pages of different sizes come from one arena (`layout`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

from octavo.formats import SCALE_BITS, SCALE_FORMAT, KVFormat
from octavo.visibility import Full, KVVisibility, State, Visibility

ALIGNMENT = 16
"""Bytes: where a plane may begin, so that it can be read in the widest loads and by TMA."""
LONG, MAX_PADDING = 16_384, 1 / 16
"""Tokens of a long sequence, and the share of its bytes that padded slots may take for the sake of
fewer groups."""


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
    visibility: KVVisibility = Full()

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
            scales.append(_scales(name, (num_kv_heads, num_scales)))
    return KVSpec(planes=(*planes, *scales), visibility=visibility)


def latent_kv(
    rank: int, rope_size: int, format: KVFormat, *, visibility: Visibility = Full()
) -> KVSpec:
    """Returns the spec of latent attention: one plane "latent" of `rank` and `rope_size` columns,
    and for formats with scales "latent_scale", those of the two parts one after the other."""
    columns = rank + rope_size
    planes = [Plane(name="latent", shape=(columns,), number=format.name, bits=format.bits)]
    if format.is_quantized:
        num_scales = format.num_scales(rank) + format.num_scales(rope_size)
        planes.append(_scales("latent", (num_scales,)))
    return KVSpec(planes=tuple(planes), visibility=visibility)


def _scales(name: str, shape: tuple[int, ...]) -> Plane:
    return Plane(name=f"{name}_scale", shape=shape, number=SCALE_FORMAT, bits=SCALE_BITS)


def state_kv(*planes: Plane, every: int = 512) -> KVSpec:
    """Returns the spec of a layer that keeps a state of a sequence and nothing of its tokens:
    planes that are not per token, saved every `every` tokens while the sequence decodes.

    What a live page holds before the first token of a sequence is anything: the layer must write
    the state of nothing there, not read it.
    """
    if any(plane.is_per_token for plane in planes):
        raise ValueError("a state has no planes per token")
    return KVSpec(planes=planes, visibility=State(every))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share block tables: layer `layers[i]` lives in slot i of the group's pages.

    How many pages a sequence takes is asked here and nowhere else.
    """

    spec: KVSpec
    layers: tuple[int, ...]
    num_slots: int
    """Layer slots in a page; slots beyond len(layers) are padding."""

    @property
    def is_state(self) -> bool:
        """Whether a sequence has one page, however long it is."""
        return isinstance(self.spec.visibility, State)

    def page_bytes(self, block_size: int) -> int:
        return self.num_slots * self.spec.offsets(block_size)[-1]

    def num_columns(self, num_tokens: int, block_size: int) -> int:
        """Returns the columns of a table that `num_tokens` tokens take, those that are seen no more
        included."""
        return min(num_tokens, 1) if self.is_state else -(-num_tokens // block_size)

    def first_column(self, position: int, block_size: int) -> int:
        """Returns the first column that a token at `position`, or a later one, sees."""
        return 0 if self.is_state else self.spec.visibility.first_visible(position) // block_size

    def most_pages_ever(self, block_size: int, step_tokens: int) -> int | None:
        """Returns the most pages of a sequence of any length; None: there is no bound."""
        if self.spec.visibility.most_visible is None:
            return None
        return self.most_pages(sys.maxsize, block_size, step_tokens)

    def most_pages(self, num_tokens: int, block_size: int, step_tokens: int) -> int:
        """Returns the most pages that a sequence holds at one time until it has `num_tokens` tokens
        and is computed at most `step_tokens` at a step.

        Of bounded visibility it holds what the step's first token sees, the step's own tokens, and
        what of the first block lies before.
        """
        most = self.spec.visibility.most_visible
        if most is not None:
            num_tokens = min(num_tokens, most + step_tokens + block_size)
        return self.num_columns(num_tokens, block_size)


def group_layers(specs: tuple[KVSpec, ...]) -> tuple[KVGroup, ...]:
    """Returns the KV groups of a model with one spec per layer, in order of first layer.

    Kinds of layers with equal bytes a token share pages of one size, as many layer slots in each:
    so they take over each other's pages. Layers that keep states make one group a kind.
    """
    kinds: dict[KVSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        kinds.setdefault(spec, []).append(layer)
    counts: dict[int, dict[KVSpec, int]] = {}
    for spec, layers in kinds.items():
        if not isinstance(spec.visibility, State):
            counts.setdefault(spec.offsets(1)[-1], {})[spec] = len(layers)
    slots = {spec: _num_slots(equal) for equal in counts.values() for spec in equal}
    return tuple(
        KVGroup(spec=spec, layers=tuple(layers[i : i + num_slots]), num_slots=num_slots)
        for spec, layers in kinds.items()
        for num_slots in (slots.get(spec, len(layers)),)
        for i in range(0, len(layers), num_slots)
    )


def _num_slots(counts: dict[KVSpec, int]) -> int:
    """Returns the slots of a page for so many layers of each kind: of those with which a long
    sequence takes hardly more than the least bytes, that which makes the fewest groups."""

    def num_groups(slots: int) -> int:
        return sum(-(-count // slots) for count in counts.values())

    def num_tokens(slots: int) -> int:
        return sum(
            -(-count // slots) * slots * min(spec.visibility.most_visible or LONG, LONG)
            for spec, count in counts.items()
        )

    choices = range(1, max(counts.values()) + 1)
    most = min(map(num_tokens, choices)) * (1 + MAX_PADDING)
    fitting = [slots for slots in choices if num_tokens(slots) <= most]
    return min(fitting, key=lambda slots: (num_groups(slots), num_tokens(slots), -slots))
