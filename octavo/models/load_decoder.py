"""How a decoder's weights are found, by the names of its family, and made into layers.

Called when a model is loaded. Never runs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.inputs import AttentionOp, KeyChange, LatentOp, QKNorm, RopeTable
from octavo.kernels.ops import Ops
from octavo.kernels.planes import Planes, values_of
from octavo.kernels.reference import dequantize_rows
from octavo.kernels.weights import ExpertBiases, ExpertWeights, Router, SharedExpert, Weight
from octavo.layers.attention import Attention, norms_early
from octavo.layers.latent import LatentAttention
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import build_rope_table, build_temperatures, mean_rotated
from octavo.layers.rope_spec import RopeSpec
from octavo.models.attention_spec import AttentionSpec, LatentAttentionSpec
from octavo.models.decoder import Decoder, Layer
from octavo.models.family import Family
from octavo.models.mlp_spec import MLPSpec, MoESpec
from octavo.models.parameter import Parameter
from octavo.models.pooler import Pooler
from octavo.models.pooling_spec import PoolingSpec
from octavo.models.spec import ModelSpec
from octavo.parallel import ALONE, Collectives
from octavo.weights.placement import Placement
from octavo.weights.split import Split


def load_decoder(
    spec: ModelSpec,
    family: Family,
    placement: Placement,
    ops: Ops,
    max_model_len: int,
    collectives: Collectives = ALONE,
) -> Decoder:
    """Returns the model with its weights where `placement` puts them, all arrived.

    The caller has checked the names (`octavo.weights.loader.check_names`). Raises what the
    placement raises. `collectives` is that of the rank that the placement is for."""
    ropes = {rope: build_rope_table(rope, max_model_len, placement.device) for rope in spec.ropes}
    loader = _Loader(spec, family, placement, ropes, max_model_len, collectives)
    embedding = loader.matrix("embedding")
    head = loader.label_head(embedding)
    decoder = Decoder(
        spec=spec,
        ops=ops,
        embedding=embedding,
        layers=tuple(loader.layer(index) for index in range(len(spec.layers))),
        final_norm=loader.norm("final_norm"),
        lm_head=loader.lm_head(embedding) if spec.pooling is None else None,
        collectives=collectives,
    )
    placement.finish()
    layers = (
        replace(one, mixer=one.mixer.prepared(ops), mlp=one.mlp.prepared(ops))
        for one in decoder.layers
    )
    lm_head = decoder.lm_head and ops.prepare((decoder.lm_head,))[0]
    pooler = None if spec.pooling is None else _pooler(spec.pooling, head, spec.logit_soft_cap)
    return replace(decoder, layers=tuple(layers), lm_head=lm_head, pooler=pooler)


def _pooler(spec: PoolingSpec, head: Weight | None, soft_cap: float | None) -> Pooler:
    """Returns the pooler over the rows of `head` that it needs, in the host's memory."""
    if head is None:
        return Pooler(spec=spec)
    rows = list(spec.label_tokens or range(spec.num_labels))
    if head.planes is not None and head.layout is not None:
        planes = Planes(*(plane[rows].cpu() for plane in head.planes))
        numbers = values_of(head.layout, planes, head.cols)
    else:
        chosen = replace(head, data=head.data[rows].cpu(), rows=len(rows))
        is_block = head.format.is_block
        numbers = dequantize_rows(chosen, slice(0, len(rows))) if is_block else chosen.data
    weight = numbers.to(torch.float64).numpy()
    return Pooler(spec=spec, weight_LM=weight, soft_cap=soft_cap if spec.label_tokens else None)


class _Loader:
    """Makes layers of a spec from placed tensors.

    The embedding, the routers and what is added to whole rows are not split over ranks."""

    def __init__(
        self,
        spec: ModelSpec,
        family: Family,
        placement: Placement,
        ropes: dict[RopeSpec, RopeTable],
        max_model_len: int,
        collectives: Collectives,
    ) -> None:
        self.spec = spec
        self.family = family
        self.placement = placement
        self.ropes = ropes
        self.max_model_len = max_model_len
        self.collectives = collectives

    def matrices(self, splits: dict[Parameter, Split | None]) -> tuple[Weight, ...]:
        """Returns the matrices as one stack, where the placement makes stacks."""
        names = {self.family.weight_name(one): split for one, split in splits.items()}
        return self.placement.matrices(names)

    def stack(self, splits: dict[Parameter, Split | None]) -> Sequence[Weight]:
        """Returns the matrices of experts."""
        names = {self.family.weight_name(one): split for one, split in splits.items()}
        return self.placement.stack(names)

    def matrix(self, name: str, layer: int = -1, split: Split | None = None) -> Weight:
        return self.matrices({Parameter(name, layer): split})[0]

    def vector(
        self, name: str, layer: int = -1, split: Split | None = None, expert: int = -1
    ) -> Tensor:
        name = self.family.weight_name(Parameter(name, layer, expert))
        return self.placement.vector(name, split)

    def norm_weight(self, name: str, layer: int = -1, split: Split | None = None) -> Tensor:
        weight = self.vector(name, layer, split)
        return weight.add_(self.spec.norm_offset) if self.spec.norm_offset else weight

    def norm(self, name: str, layer: int = -1) -> RMSNorm:
        return RMSNorm(weight=self.norm_weight(name, layer), eps=self.spec.norm_eps)

    def lm_head(self, embedding: Weight) -> Weight:
        """Returns this rank's rows; a vocabulary that does not divide is whole on all ranks."""
        rank, size = self.collectives.rank, self.collectives.size
        num_rows = self.spec.of_rank(size).lm_head_rows
        if not self.spec.tie_embeddings:
            split = Split(axis="rows", unit="token ids", num_units=self.spec.vocab_size)
            return self.matrix("lm_head", split=split if num_rows else None)
        if num_rows is None:
            return embedding
        return embedding.part(rank * num_rows, (rank + 1) * num_rows)

    def label_head(self, embedding: Weight) -> Weight | None:
        """Returns the matrix that has a row for each label among its own, whole on all ranks."""
        pooling = self.spec.pooling
        if pooling is None or pooling.kind == "embed":
            return None
        if pooling.num_labels:
            return self.matrix("score")
        return embedding if self.spec.tie_embeddings else self.matrix("lm_head")

    def layer(self, index: int) -> Layer:
        spec = self.spec.layers[index]
        return Layer(
            mixer_norm=self.norm("attention_norm", index),
            mixer=spec.attention.made_by(self, index),
            mlp_norm=self.norm("mlp_norm", index),
            mlp=spec.mlp.made_by(self, index),
            mixer_post_norm=self.norm("attention_post_norm", index) if spec.post_norms else None,
            mlp_post_norm=self.norm("mlp_post_norm", index) if spec.post_norms else None,
        )

    def dense(self, spec: MLPSpec, layer: int) -> GatedMLP:
        gate_up, down = self.gated("", spec, layer)
        return GatedMLP(gate_up=gate_up, down=down, activation=spec.activation)

    def latent_attention(self, spec: LatentAttentionSpec, layer: int) -> LatentAttention:
        has_rank = spec.q_rank is not None
        splits = {"q_a": None} if has_rank else {"q": spec.query_split}
        splits |= {"kv_a": spec.latent_split}
        query_norm = query_up = None
        if has_rank:
            query_norm = RMSNorm(weight=self.norm_weight("q_a_norm", layer), eps=spec.norm_eps)
            query_up = self.matrix("q_b", layer, spec.query_split)
        inputs = self.matrices({Parameter(name, layer): one for name, one in splits.items()})
        is_first = self.collectives.rank == 0
        input_bias = None
        if spec.bias:  # queries without a latent vector have none
            latent_bias = self.vector("kv_a_bias", layer, spec.latent_split)
            query_bias = latent_bias.new_zeros(inputs[0].rows)
            if has_rank:
                query_bias = self.vector("q_a_bias", layer)
            input_bias = torch.cat((query_bias, latent_bias))
        return LatentAttention(
            layer=layer,
            op=LatentOp(
                num_heads=spec.head_split.share(self.collectives.size),
                rank=spec.kv_rank,
                nope_size=spec.nope_size,
                rope_size=spec.rope_size,
                value_size=spec.value_size,
                scale=spec.scale,
                rope=self.ropes[spec.rope],
                norm_R=self.norm_weight("kv_a_norm", layer),
                norm_eps=spec.norm_eps,
                weights=None,
            ),
            inputs=inputs,
            query_norm=query_norm,
            query_up=query_up,
            up=self.matrix("kv_b", layer, spec.head_split),
            output=self.matrix("o", layer, spec.output_split),
            input_bias=input_bias,
            output_bias=self.vector("o_bias", layer) if spec.bias and is_first else None,
        )

    def attention(self, spec: AttentionSpec, layer: int) -> Attention:
        splits = {"q": spec.query_split, "k": spec.key_split, "v": spec.value_split}
        biases: list[Tensor] = []
        if spec.qkv_bias:
            biases = [self.vector(f"{part}_bias", layer, split) for part, split in splits.items()]
        qkv_bias = torch.cat(biases) if biases else None
        o_bias = None
        if spec.o_bias and self.collectives.rank == 0:  # added once: the outputs are summed
            o_bias = self.vector("o_bias", layer)
        qk_norm = self.qk_norm(spec, layer)
        weights = self.matrices({Parameter(part, layer): split for part, split in splits.items()})
        heads = replace(spec.query_split, pairs=None)
        is_early = norms_early(qk_norm, spec.clip_qkv, self.collectives)
        return Attention(
            layer=layer,
            op=AttentionOp(
                num_heads=weights[0].rows // spec.head_size,
                num_kv_heads=weights[1].rows // spec.head_size,
                head_size=spec.head_size,
                scale=spec.scale,
                visibility=spec.visibility,
                rope=None if spec.rope is None else self.ropes[spec.rope],
                qk_norm=None if is_early else qk_norm,
                sinks_H=self.vector("sinks", layer, heads) if spec.has_sinks else None,
                soft_cap=spec.soft_cap,
                key_change=self.key_change(spec, biases),
            ),
            qkv=weights,
            output=self.matrix("o", layer, spec.output_split),
            temperatures=self.temperatures(spec),
            early_norm=qk_norm if is_early else None,
            clip_qkv=spec.clip_qkv,
            qkv_bias=qkv_bias,
            output_bias=o_bias,
        )

    def key_change(self, spec: AttentionSpec, biases: list[Tensor]) -> KeyChange | None:
        """Returns what of the keys' bias is the same at all positions, where nothing but the
        rotation comes between the bias and the softmax: what is large in all keys of a model is
        mostly that. A sample says more (`octavo.models.sampled_keys`)."""
        is_plain = spec.qk_norm is None and spec.clip_qkv is None
        is_plain = is_plain and not spec.has_sinks and spec.soft_cap is None
        if not biases or not is_plain or spec.rope is None:
            return None
        bias_KD = biases[1].view(-1, spec.head_size)
        return KeyChange(shift_KD=mean_rotated(bias_KD, self.ropes[spec.rope]))

    def qk_norm(self, spec: AttentionSpec, layer: int) -> QKNorm | None:
        if spec.qk_norm is None:
            return None
        per_head = spec.qk_norm != "projection"
        if spec.qk_norm == "unweighted":
            query = key = torch.ones(spec.head_size, device=self.placement.device)
        else:
            query = self.norm_weight("q_norm", layer, None if per_head else spec.query_split)
            key = self.norm_weight("k_norm", layer, None if per_head else spec.key_split)
        return QKNorm(query=query, key=key, eps=self.spec.norm_eps, per_head=per_head)

    def temperatures(self, spec: AttentionSpec) -> Tensor | None:
        if spec.temperature is None:
            return None
        return build_temperatures(spec.temperature, self.max_model_len, self.placement.device)

    def gated(self, prefix: str, spec: MLPSpec, layer: int) -> tuple[tuple[Weight, ...], Weight]:
        """Returns gate and up, and down."""
        rows = spec.split
        both = self.matrices({Parameter(f"{prefix}{p}", layer): rows for p in ("gate", "up")})
        return both, self.matrix(f"{prefix}down", layer, replace(rows, axis="cols"))

    def experts(self, spec: MoESpec, layer: int) -> ExpertWeights:
        rows = None if spec.is_whole else spec.split
        gate, up, down = (
            self.stack({Parameter(part, layer, e): split for e in self.held(spec)})
            for part, split in (
                ("expert_gate", rows),
                ("expert_up", rows),
                ("expert_down", rows and replace(rows, axis="cols")),
            )
        )
        biases = self.expert_biases(spec, layer) if spec.expert_bias else None
        return ExpertWeights(gate=gate, up=up, down=down, biases=biases)

    def held(self, spec: MoESpec) -> range:
        """Returns the experts that this rank has, or has a part of."""
        if not spec.is_whole:
            return range(spec.num_experts)
        count = spec.expert_split.share(self.collectives.size)
        return range(self.collectives.rank * count, (self.collectives.rank + 1) * count)

    def expert_biases(self, spec: MoESpec, layer: int) -> ExpertBiases:
        def stack(name: str, split: Split | None) -> Tensor:
            each = (self.vector(name, layer, split, e) for e in self.held(spec))
            return torch.stack(list(each))

        down_EM = stack("expert_down_bias", None)
        if self.collectives.rank > 0 and not spec.is_whole:  # added once: outputs are summed
            down_EM.zero_()
        return ExpertBiases(
            gate_EF=stack("expert_gate_bias", None if spec.is_whole else spec.split),
            up_EF=stack("expert_up_bias", None if spec.is_whole else spec.split),
            down_EM=down_EM,
        )

    def moe(self, spec: MoESpec, layer: int) -> MoE:
        names = ("router", "shared_router") if spec.shared_gate else ("router",)
        router = Router(
            weights=self.matrices({Parameter(name, layer): None for name in names}),
            rule=spec.rule,
            bias_E=self.vector("router_bias", layer) if spec.router_bias else None,
            correction_E=self.vector("router_correction", layer) if spec.has_correction else None,
            held=self.held(spec) if spec.is_whole and self.collectives.size > 1 else None,
        )
        shared = None
        if spec.shared is not None:
            gate_up, down = self.gated("shared_", spec.shared, layer)
            shared = SharedExpert(gate_up=gate_up, down=down)
        return MoE(
            counts_row=self.spec.moe_layers.index(layer),
            router=router,
            experts=self.experts(spec, layer),
            shared=shared,
            activation=spec.activation,
        )
