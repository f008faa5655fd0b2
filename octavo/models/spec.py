"""What a decoder is, as frozen data: sizes, attention and MLP of every layer, RoPE.

Family files make it from a config, the planner and the loader read it, `decoder` runs it. It never
imports torch and never looks at a file: everything here is known before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from octavo.formats import KVFormat
from octavo.kernels.limits import AttentionWants, attention_wants
from octavo.kv_cache.spec import KVSpec, attention_kv
from octavo.layers.rope_spec import RopeSpec
from octavo.visibility import Full, Visibility, Window
from octavo.weights.split import Split

if TYPE_CHECKING:  # the planner runs without torch
    from octavo.kernels.activations import Activation
    from octavo.kernels.routing import RoutingRule

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """One tensor of a model by its canonical name; -1 where there is no layer or expert."""

    name: str
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    """A token sees itself and the `window - 1` before it; None sees all."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to [-clip_qkv, clip_qkv] before RoPE."""

    @property
    def visibility(self) -> Visibility:
        return Full() if self.window is None else Window(self.window)

    @property
    def wants(self) -> AttentionWants:
        """What a back end must be able to do for the layer."""
        return attention_wants(head_size=self.head_size, visibility=self.visibility)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def query_split(self) -> Split:
        return Split(axis="rows", unit="query heads", num_units=self.num_heads)

    @property
    def kv_split(self) -> Split:
        return Split(axis="rows", unit="kv heads", num_units=self.num_kv_heads, may_repeat=True)

    def of_rank(self, size: int) -> AttentionSpec:
        heads, kv_heads = self.query_split.share(size), self.kv_split.share(size)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """A gated MLP: act(x @ gate.T) * (x @ up.T) @ down.T."""

    size: int
    activation: Activation

    @property
    def split(self) -> Split:
        return Split(axis="rows", unit="hidden units", num_units=self.size)

    def of_rank(self, size: int) -> MLPSpec:
        return replace(self, size=self.split.share(size))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Experts that are gated MLPs of equal size, and perhaps one that every token goes to."""

    num_experts: int
    expert_size: int
    activation: Activation
    rule: RoutingRule
    shared_size: int = 0
    """Hidden size of the shared expert; 0: there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid gate of the token."""

    @property
    def top_k(self) -> int:
        """Experts that a token goes to."""
        return self.rule.top_k

    @property
    def split(self) -> Split:
        return Split(axis="rows", unit="hidden units of an expert", num_units=self.expert_size)

    @property
    def shared(self) -> MLPSpec | None:
        """The expert that every token goes to."""
        return (
            MLPSpec(size=self.shared_size, activation=self.activation) if self.shared_size else None
        )

    def of_rank(self, size: int) -> MoESpec:
        shared_size = self.shared.of_rank(size).size if self.shared else 0
        return replace(self, expert_size=self.split.share(size), shared_size=shared_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: norm, attention, norm, MLP or MoE, with two residual additions."""

    attention: AttentionSpec
    mlp: MLPSpec | MoESpec

    def of_rank(self, size: int) -> LayerSpec:
        return LayerSpec(attention=self.attention.of_rank(size), mlp=self.mlp.of_rank(size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole decoder."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tie_embeddings: bool
    max_position_embeddings: int
    rope: RopeSpec
    lm_head_rows: int | None = None
    """Where ranks share the head: each one's rows. None: all have all."""

    @property
    def trained_len(self) -> int:
        """Tokens of the longest text that the model was trained for, or its RoPE stretched to."""
        return self.rope.stretched_len(self.max_position_embeddings)

    @property
    def default_len(self) -> int:
        """Context length where none is asked for. What linear and dynamic RoPE add on top has to be
        asked for: dynamic changes what short texts give, linear is often counted in already."""
        return self.trained_len if self.rope.type == "yarn" else self.max_position_embeddings

    def of_rank(self, size: int) -> ModelSpec:
        """Returns what each of `size` tensor parallel ranks holds and computes: its heads, its part
        of every MLP, and of the vocabulary's logits if they can be shared. Embeddings, routers and
        norms are whole on all ranks.

        Raises ConfigError naming what cannot be shared and the sizes that could.
        """
        if size == 1:
            return self
        rows = self.vocab_size // size if self.vocab_size % size == 0 else None
        layers = tuple(layer.of_rank(size) for layer in self.layers)
        return replace(self, layers=layers, lm_head_rows=rows)

    def kv_specs(self, kv_format: KVFormat) -> tuple[KVSpec, ...]:
        """Returns one KVSpec per layer, for `octavo.kv_cache.spec.group_layers`."""
        return tuple(
            attention_kv(
                layer.attention.num_kv_heads,
                layer.attention.head_size,
                kv_format,
                visibility=layer.attention.visibility,
            )
            for layer in self.layers
        )

    @property
    def attention_wants(self) -> AttentionWants:
        return AttentionWants.of_all(layer.attention.wants for layer in self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoESpec))

    @property
    def max_experts(self) -> int:
        """Experts of the layer that has most; 0 for a dense model."""
        return max(
            (layer.mlp.num_experts for layer in self.layers if isinstance(layer.mlp, MoESpec)),
            default=0,
        )

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.parameters())

    def parameters(self) -> Iterator[tuple[Parameter, Shape]]:
        """Yields every tensor with its shape; matrices are [outputs, inputs]."""
        vocab = (self.vocab_size, self.hidden_size)
        yield Parameter("embedding"), vocab
        for index, layer in enumerate(self.layers):
            yield Parameter("attention_norm", index), (self.hidden_size,)
            for name, shape in _attention_shapes(layer.attention, self.hidden_size):
                yield Parameter(name, index), shape
            yield Parameter("mlp_norm", index), (self.hidden_size,)
            if isinstance(layer.mlp, MoESpec):
                yield from _moe_parameters(layer.mlp, self.hidden_size, index)
            else:
                for name, shape in _gated_shapes("", layer.mlp.size, self.hidden_size):
                    yield Parameter(name, index), shape
        yield Parameter("final_norm"), (self.hidden_size,)
        if not self.tie_embeddings:
            yield Parameter("lm_head"), (self.lm_head_rows or self.vocab_size, self.hidden_size)


def _attention_shapes(spec: AttentionSpec, hidden: int) -> Iterator[tuple[str, Shape]]:
    sizes = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
    for name, size in sizes.items():
        yield name, (size, hidden)
        if spec.qkv_bias:
            yield f"{name}_bias", (size,)
    yield "o", (hidden, spec.q_size)
    if spec.o_bias:
        yield "o_bias", (hidden,)
    if spec.qk_norm is not None:
        per_head = spec.qk_norm == "head"
        yield "q_norm", (spec.head_size if per_head else spec.q_size,)
        yield "k_norm", (spec.head_size if per_head else spec.kv_size,)


def _gated_shapes(prefix: str, size: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate", (size, hidden)
    yield f"{prefix}up", (size, hidden)
    yield f"{prefix}down", (hidden, size)


def _moe_parameters(spec: MoESpec, hidden: int, layer: int) -> Iterator[tuple[Parameter, Shape]]:
    yield Parameter("router", layer), (spec.num_experts, hidden)
    for expert in range(spec.num_experts):
        for name, shape in _gated_shapes("expert_", spec.expert_size, hidden):
            yield Parameter(name, layer, expert), shape
    if spec.shared_size:
        for name, shape in _gated_shapes("shared_", spec.shared_size, hidden):
            yield Parameter(name, layer), shape
        if spec.shared_gate:
            yield Parameter("shared_router", layer), (1, hidden)
