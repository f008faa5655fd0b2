"""What the KV cache of one attention layer costs and who can still see it. No torch.

The models declare one KVSpec per layer; equal specs form KV groups, whose pages are cut from one
arena. Read by the planner, the manager and the storage.

All groups draw equal-sized pages from one pool, so every group has the same number of layer slots;
a kind of layer that is more numerous is split into several groups, the last one padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.formats import KVFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape and visibility of one layer's keys and values."""

    num_kv_heads: int
    head_size: int
    format: KVFormat
    window: int | None = None
    """A token sees itself and the `window - 1` before it; None sees all."""

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_size * self.format.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share block tables: layer `layers[i]` lives in slot i of the group's pages."""

    spec: KVSpec
    layers: tuple[int, ...]
    num_slots: int
    """Layer slots in a page; slots beyond len(layers) are padding."""

    def page_bytes(self, block_size: int) -> int:
        return self.num_slots * block_size * self.spec.token_bytes


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
