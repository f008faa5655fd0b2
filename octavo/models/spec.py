"""What a decoder is, as frozen data: sizes, attention and MLP of every layer.

Family files make it from a config, the planner and the loader read it, `decoder` runs it. It never
imports torch and never looks at a file: everything here is known before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from octavo.errors import ConfigError
from octavo.formats import KVFormats
from octavo.kernels.limits import AttentionWants
from octavo.kv_cache.spec import KVSpec
from octavo.layers.rope_spec import RopeSpec
from octavo.models.attention_spec import AttentionSpec, LatentAttentionSpec
from octavo.models.mlp_spec import MLPSpec, MoESpec
from octavo.models.parameter import Parameter, Shape
from octavo.models.pooling_spec import PoolingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: norm, attention, norm, MLP or MoE, with two residual additions."""

    attention: AttentionSpec | LatentAttentionSpec
    mlp: MLPSpec | MoESpec
    post_norms: bool = False
    """What attention and MLP add to the residual is normed too."""

    def of_rank(self, size: int) -> LayerSpec:
        return replace(self, attention=self.attention.of_rank(size), mlp=self.mlp.of_rank(size))

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the layer's norms over whole rows."""
        post = ("attention_post_norm", "mlp_post_norm") if self.post_norms else ()
        return ("attention_norm", "mlp_norm", *post)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole decoder."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tie_embeddings: bool
    max_position_embeddings: int
    norm_offset: float = 0.0
    """Added to the weights of every norm, as the checkpoint has them."""
    embedding_scale: float = 1.0
    """Multiplies the embeddings; rounded to the activations' dtype first."""
    logit_soft_cap: float | None = None
    """Logits s become logit_soft_cap * tanh(s / logit_soft_cap)."""
    lm_head_rows: int | None = None
    """Where ranks share the head: each one's rows. None: all have all."""
    pooling: PoolingSpec | None = None
    """What it makes of texts in place of tokens."""

    @property
    def has_lm_head(self) -> bool:
        """Whether anything is made of logits of the vocabulary."""
        return self.pooling is None or bool(self.pooling.label_tokens)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotary embeddings of the layers, each once."""
        found = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def trained_len(self) -> int:
        """Tokens of the longest text that the model was trained for, or that all its RoPEs are
        stretched to."""
        longest = self.max_position_embeddings
        return min((rope.stretched_len(longest) for rope in self.ropes), default=longest)

    @property
    def default_len(self) -> int:
        """Context length where none is asked for. What linear and dynamic RoPE add on top has to be
        asked for: dynamic changes what short texts give, linear is often counted in already."""
        is_yarn = all(rope.type == "yarn" for rope in self.ropes)
        return self.trained_len if is_yarn else self.max_position_embeddings

    def of_rank(self, size: int) -> ModelSpec:
        """Returns what each of `size` tensor parallel ranks holds and computes: its heads, its part
        of every MLP, and of the vocabulary's logits if they can be shared. Embeddings, routers and
        norms are whole on all ranks.

        Raises ConfigError naming what cannot be shared and the sizes that could.
        """
        if size == 1:
            return self
        is_shared = self.pooling is None and self.vocab_size % size == 0
        rows = self.vocab_size // size if is_shared else None
        layers = tuple(layer.of_rank(size) for layer in self.layers)
        return replace(self, layers=layers, lm_head_rows=rows)

    def with_whole_experts(self) -> ModelSpec:
        """Returns the same model, of which each rank is to have some experts whole (expert
        parallel). Raises ConfigError for one without experts."""
        if not self.moe_layers:
            raise ConfigError(
                "enable_expert_parallel shares experts between ranks, and this model has none; "
                "leave it out",
                field="enable_expert_parallel",
            )
        layers = (
            replace(one, mlp=replace(one.mlp, is_whole=True))
            if isinstance(one.mlp, MoESpec)
            else one
            for one in self.layers
        )
        return replace(self, layers=tuple(layers))

    def kv_specs(self, kv: KVFormats) -> tuple[KVSpec, ...]:
        """Returns one KVSpec per layer, for `octavo.kv_cache.spec.group_layers`."""
        return tuple(layer.attention.kv_spec(kv) for layer in self.layers)

    def attention_wants(self, kv: KVFormats) -> AttentionWants:
        """Returns what a back end must be able to do for the layers, with KV in these formats."""
        wants = AttentionWants.of_all(layer.attention.wants for layer in self.layers)
        return replace(wants, kv=kv)

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
        hidden = self.hidden_size
        yield Parameter("embedding"), (self.vocab_size, hidden)
        for index, layer in enumerate(self.layers):
            for name in layer.norms:
                yield Parameter(name, index), (hidden,)
            for name, shape in layer.attention.parameters(hidden):
                yield Parameter(name, index), shape
            for name, expert, shape in layer.mlp.parameters(hidden):
                yield Parameter(name, index, expert), shape
        yield Parameter("final_norm"), (hidden,)
        if self.has_lm_head and not self.tie_embeddings:
            yield Parameter("lm_head"), (self.lm_head_rows or self.vocab_size, hidden)
        if self.pooling is not None and self.pooling.num_labels:
            yield Parameter("score"), (self.pooling.num_labels, hidden)
