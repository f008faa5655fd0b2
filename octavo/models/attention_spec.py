"""What the attention of one layer is, as frozen data.

Part of a `LayerSpec`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from octavo.errors import ConfigError
from octavo.formats import KVFormats
from octavo.kernels.facts import (
    EXPANDED_TOKENS,
    SHORT_TOKENS,
    most_lone_partials,
    short_tokens,
    split_partials,
)
from octavo.kernels.limits import AttentionFeature, AttentionWants, attention_wants
from octavo.kv_cache.spec import KVSpec, attention_kv, latent_kv
from octavo.layers.rope_spec import QueryTemperature, RopeSpec
from octavo.models.parameter import Shape
from octavo.visibility import Full, Visibility
from octavo.weights.split import RowPairs, Split

Mixer_co = TypeVar("Mixer_co", covariant=True)


class Mixers(Protocol[Mixer_co]):
    """Who makes something of each kind of attention: a method a kind."""

    def attention(self, spec: AttentionSpec, layer: int) -> Mixer_co: ...

    def latent_attention(self, spec: LatentAttentionSpec, layer: int) -> Mixer_co: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rope: RopeSpec | None
    """None: queries and keys are not rotated."""
    visibility: Visibility = Full()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection", "unweighted"] | None = None
    """RMSNorm of queries and keys before RoPE: over each head, over the whole projection, or over
    each head without weights (which may as well come after RoPE)."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to [-clip_qkv, clip_qkv] before RoPE."""
    has_sinks: bool = False
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap)."""
    temperature: QueryTemperature | None = None

    def made_by(self, mixers: Mixers[Mixer_co], layer: int) -> Mixer_co:
        return mixers.attention(self, layer)

    @property
    def wants(self) -> AttentionWants:
        """What a back end must be able to do for the layer."""
        return attention_wants(
            head_size=self.head_size,
            visibility=self.visibility,
            is_rotated=self.rope is not None,
            has_sinks=self.has_sinks,
            soft_cap=self.soft_cap,
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def projected_size(self) -> int:
        """Numbers of a token that the products make of its row."""
        return self.q_size + 2 * self.kv_size

    @property
    def attended_size(self) -> int:
        """Numbers of a token's queries and results, as attention has them at once; before them
        copies of what is clamped."""
        copies = 0 if self.clip_qkv is None else 2
        return 2 * self.q_size + copies * self.projected_size

    @property
    def partial_size(self) -> int:
        """Numbers of a head's partial result."""
        return self.head_size

    @property
    def short_tokens(self) -> int:
        """Tokens of short chunks whose partial results there is room for."""
        return SHORT_TOKENS

    def lone_partials(self, num_rows: int, max_visible: int) -> int:
        """Returns the most partial results of up to `num_rows` single queries together."""
        return num_rows * split_partials(max_visible)

    @property
    def expanded_size(self) -> int:
        """Numbers of keys and values that are made for a layer, beside those of the cache."""
        return 0

    @property
    def pair_flops(self) -> int:
        """Of a query and a key that meet, all heads."""
        return 4 * self.q_size

    def products(self, hidden: int) -> tuple[Shape, ...]:
        """Returns rows and columns of the products, those side by side as one."""
        return (self.projected_size, hidden), (hidden, self.q_size)

    @property
    def _pairs(self) -> RowPairs | None:
        is_paired = self.rope is not None and self.rope.pairs_neighbours
        return RowPairs(head_size=self.head_size) if is_paired else None

    @property
    def query_split(self) -> Split:
        return Split(axis="rows", unit="query heads", num_units=self.num_heads, pairs=self._pairs)

    @property
    def key_split(self) -> Split:
        return replace(self.value_split, pairs=self._pairs)

    @property
    def value_split(self) -> Split:
        return Split(axis="rows", unit="kv heads", num_units=self.num_kv_heads, may_repeat=True)

    @property
    def output_split(self) -> Split:
        return Split(axis="cols", unit="query heads", num_units=self.num_heads)

    def of_rank(self, size: int) -> AttentionSpec:
        heads, kv_heads = self.query_split.share(size), self.value_split.share(size)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)

    def kv_spec(self, kv: KVFormats) -> KVSpec:
        """Returns what the layer keeps of a token."""
        return attention_kv(
            self.num_kv_heads,
            self.head_size,
            kv.key,
            value_format=kv.value,
            visibility=self.visibility,
        )

    def parameters(self, hidden: int) -> Iterator[tuple[str, Shape]]:
        """Yields every tensor with its shape."""
        for name, size in {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}.items():
            yield name, (size, hidden)
            if self.qkv_bias:
                yield f"{name}_bias", (size,)
        yield "o", (hidden, self.q_size)
        if self.o_bias:
            yield "o_bias", (hidden,)
        if self.qk_norm in ("head", "projection"):
            per_head = self.qk_norm == "head"
            yield "q_norm", (self.head_size if per_head else self.q_size,)
            yield "k_norm", (self.head_size if per_head else self.kv_size,)
        if self.has_sinks:
            yield "sinks", (self.num_heads,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionSpec:
    """Multi-head latent attention of one layer (DeepSeek-V2, arXiv 2405.04434, 2.1).

    A token keeps one latent vector for all heads and one rotated key; queries may come through a
    latent vector of their own.
    """

    num_heads: int
    kv_rank: int
    """Numbers of the latent vector that keys and values are made of."""
    nope_size: int
    """Numbers of a head's query and key that are not rotated."""
    rope_size: int
    """Numbers of a head's query that are rotated, and of the one rotated key."""
    value_size: int
    q_rank: int | None
    """Numbers of the queries' latent vector; None: there is none."""
    scale: float
    """Multiplies q . k; the square of YaRN's mscale is in it."""
    rope: RopeSpec
    norm_eps: float
    """Of the norms of both latent vectors."""
    bias: bool = False
    """The products that make the latent vectors, and the output, have biases."""
    visibility: Visibility = Full()

    def made_by(self, mixers: Mixers[Mixer_co], layer: int) -> Mixer_co:
        return mixers.latent_attention(self, layer)

    @property
    def wants(self) -> AttentionWants:
        """What a back end must be able to do for the layer."""
        return AttentionWants(
            features=frozenset((AttentionFeature.LATENT,)),
            vector_sizes=frozenset((self.kv_rank, self.rope_size)),
            rotated_sizes=frozenset((self.rope_size,)),
        )

    @property
    def head_size(self) -> int:
        """Numbers of a head's query."""
        return self.nope_size + self.rope_size

    @property
    def projected_size(self) -> int:
        """Numbers of a token that the products make of its row."""
        return (self.q_rank or 0) + self.q_size + self.num_columns

    @property
    def attended_size(self) -> int:
        """Numbers of a token's queries and results, as attention has them at once."""
        absorbed = self.num_heads * (self.num_columns + self.kv_rank)
        return absorbed + self.num_heads * self.value_size

    @property
    def partial_size(self) -> int:
        """Numbers of a head's partial result."""
        return self.kv_rank

    @property
    def short_tokens(self) -> int:
        """Tokens of short chunks whose partial results there is room for."""
        return short_tokens(self.num_heads, self.kv_rank)

    def lone_partials(self, num_rows: int, max_visible: int) -> int:
        """Returns the most partial results of up to `num_rows` single queries together."""
        return most_lone_partials(num_rows, max_visible)

    @property
    def expanded_size(self) -> int:
        """Numbers of latent vectors, and of the keys and values of all heads that are made of them,
        that there are at once."""
        heads = self.num_heads * (self.nope_size + self.value_size)
        return EXPANDED_TOKENS * (self.num_columns + heads)

    @property
    def pair_flops(self) -> int:
        """Of a query and a key that meet, all heads, with keys and values of their own."""
        return 2 * self.num_heads * (self.head_size + self.value_size)

    def products(self, hidden: int) -> tuple[Shape, ...]:
        """Returns rows and columns of the products, those side by side as one."""
        output = (hidden, self.num_heads * self.value_size)
        if self.q_rank is None:
            return (self.q_size + self.num_columns, hidden), output
        return (self.q_rank + self.num_columns, hidden), (self.q_size, self.q_rank), output

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def num_columns(self) -> int:
        """Numbers that a token keeps."""
        return self.kv_rank + self.rope_size

    @property
    def query_split(self) -> Split:
        """Of the product that makes queries: heads, of which the last rows are rotated."""
        pairs = RowPairs(head_size=self.head_size, first=self.nope_size)
        return Split(
            axis="rows",
            unit="query heads",
            num_units=self.num_heads,
            pairs=pairs if self.rope.pairs_neighbours else None,
        )

    @property
    def latent_split(self) -> Split:
        """Of the product that makes what is kept: whole on all ranks, the last rows rotated."""
        pairs = RowPairs(head_size=self.num_columns, first=self.kv_rank)
        return Split(
            axis="rows",
            unit="latent vectors",
            num_units=1,
            may_repeat=True,
            pairs=pairs if self.rope.pairs_neighbours else None,
        )

    @property
    def head_split(self) -> Split:
        """Of the product that makes keys and values of the latent vector."""
        return replace(self.query_split, pairs=None)

    @property
    def output_split(self) -> Split:
        return replace(self.head_split, axis="cols")

    def of_rank(self, size: int) -> LatentAttentionSpec:
        return replace(self, num_heads=self.query_split.share(size))

    def kv_spec(self, kv: KVFormats) -> KVSpec:
        """Returns what the layer keeps of a token. Raises ConfigError for two formats."""
        if kv.key != kv.value:
            raise ConfigError(
                f"kv_cache_dtype {kv.name} names two formats, but latent attention keeps keys and "
                f"values in one vector; use {kv.key.name} or {kv.value.name}",
                field="kv_cache_dtype",
            )
        return latent_kv(self.kv_rank, self.rope_size, kv.key, visibility=self.visibility)

    def parameters(self, hidden: int) -> Iterator[tuple[str, Shape]]:
        """Yields every tensor with its shape."""
        if self.q_rank is None:
            yield "q", (self.q_size, hidden)
        else:
            yield "q_a", (self.q_rank, hidden)
            if self.bias:
                yield "q_a_bias", (self.q_rank,)
            yield "q_a_norm", (self.q_rank,)
            yield "q_b", (self.q_size, self.q_rank)
        yield "kv_a", (self.num_columns, hidden)
        if self.bias:
            yield "kv_a_bias", (self.num_columns,)
        yield "kv_a_norm", (self.kv_rank,)
        yield "kv_b", (self.num_heads * (self.nope_size + self.value_size), self.kv_rank)
        yield "o", (hidden, self.num_heads * self.value_size)
        if self.bias:
            yield "o_bias", (hidden,)
