"""The one forward pass, driven by a ModelSpec, and how its weights are found.

Called by the runner. It never knows a family: what differs is data, or a layer. Everything about a
step comes in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.ops import (
    Activation,
    AttentionBatch,
    ExpertWeights,
    Ops,
    QKNorm,
    RopeTable,
    Weight,
)
from octavo.kv_cache.storage import KVStorage
from octavo.layers.attention import Attention
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE, SharedExpert
from octavo.layers.norm import RMSNorm
from octavo.layers.rope import build_rope_table
from octavo.models.family import Family
from octavo.models.spec import AttentionSpec, ModelSpec, MoESpec, Parameter
from octavo.weights.source import TensorSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A loaded model: weights and the ops that run them; no state changes between calls."""

    spec: ModelSpec
    ops: Ops
    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    lm_head: Weight

    def forward(
        self,
        token_ids_T: Tensor,
        batches: tuple[AttentionBatch, ...],
        storage: KVStorage,
        expert_counts_LE: Tensor,
        num_live: Tensor | None = None,
    ) -> Tensor:
        """Returns normed hidden states [T, M]; writes the step's keys and values.

        token_ids_T is int32; `batches` has one entry per KV group of `storage`. The tokens routed
        to each expert are added to expert_counts_LE, integers [MoE layers, experts]. Tokens from
        num_live (int32 [1]) on pad a captured graph.
        """
        ops = self.ops
        residual_TM = ops.embedding(token_ids_T, self.embedding)
        x_TM = self.layers[0].attention_norm.run(residual_TM, ops)
        next_norms = (*(layer.attention_norm for layer in self.layers[1:]), self.final_norm)
        num_moe = 0
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            batch = batches[storage.group_of(index)]
            x_TM = layer.attention.run(x_TM, storage.layer(index), batch, ops)
            x_TM = layer.mlp_norm.add_and_run(x_TM, residual_TM, ops)
            if isinstance(layer.mlp, MoE):
                x_TM = layer.mlp.run(x_TM, ops, expert_counts_LE[num_moe], num_live)
                num_moe += 1
            else:
                x_TM = layer.mlp.run(x_TM, ops)
            x_TM = next_norm.add_and_run(x_TM, residual_TM, ops)
        return x_TM

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Returns [S, V] float32 of normed hidden states."""
        return self.ops.logits(hidden_SM, self.lm_head)


def load_decoder(
    spec: ModelSpec, family: Family, source: TensorSource, ops: Ops, max_model_len: int
) -> Decoder:
    """Returns the model with weights from `source`. Raises WeightsError on a broken tensor.

    The caller has checked the names (`octavo.weights.loader.check_names`)."""
    loader = _Loader(spec, family, source, build_rope_table(spec.rope, max_model_len))
    embedding = loader.matrix("embedding")
    return Decoder(
        spec=spec,
        ops=ops,
        embedding=embedding,
        layers=tuple(loader.layer(index) for index in range(len(spec.layers))),
        final_norm=loader.norm("final_norm"),
        lm_head=embedding if spec.tie_embeddings else loader.matrix("lm_head"),
    )


class _Loader:
    """Makes layers of a spec from a source of tensors."""

    def __init__(
        self, spec: ModelSpec, family: Family, source: TensorSource, rope: RopeTable
    ) -> None:
        self.spec = spec
        self.family = family
        self.source = source
        self.rope = rope

    def matrix(self, name: str, layer: int = -1, expert: int = -1) -> Weight:
        return self.source.matrix(self.family.weight_name(Parameter(name, layer, expert)))

    def vector(self, name: str, layer: int = -1) -> Tensor:
        return self.source.vector(self.family.weight_name(Parameter(name, layer)))

    def norm(self, name: str, layer: int = -1) -> RMSNorm:
        return RMSNorm(weight=self.vector(name, layer), eps=self.spec.norm_eps)

    def layer(self, index: int) -> Layer:
        spec = self.spec.layers[index]
        if isinstance(spec.mlp, MoESpec):
            mlp = self.moe(spec.mlp, index)
        else:
            mlp = self.mlp("", spec.mlp.activation, index)
        return Layer(
            attention_norm=self.norm("attention_norm", index),
            attention=self.attention(spec.attention, index),
            mlp_norm=self.norm("mlp_norm", index),
            mlp=mlp,
        )

    def attention(self, spec: AttentionSpec, layer: int) -> Attention:
        qkv_bias = o_bias = qk_norm = None
        if spec.qkv_bias:
            qkv_bias = torch.cat([self.vector(f"{part}_bias", layer) for part in "qkv"])
        if spec.o_bias:
            o_bias = self.vector("o_bias", layer)
        if spec.qk_norm is not None:
            qk_norm = QKNorm(
                query=self.vector("q_norm", layer),
                key=self.vector("k_norm", layer),
                eps=self.spec.norm_eps,
                per_head=spec.qk_norm == "head",
            )
        weights = tuple(self.matrix(part, layer) for part in "qkv")
        return Attention(
            qkv=Linear(weights=weights, bias=qkv_bias),
            output=Linear(weights=(self.matrix("o", layer),), bias=o_bias),
            qk_norm=qk_norm,
            rope=self.rope,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            scale=spec.scale,
            window=spec.window,
            clip_qkv=spec.clip_qkv,
        )

    def mlp(self, prefix: str, activation: Activation, layer: int) -> GatedMLP:
        gate, up, down = (self.matrix(f"{prefix}{part}", layer) for part in ("gate", "up", "down"))
        return GatedMLP(gate=gate, up=up, down=down, activation=activation)

    def moe(self, spec: MoESpec, layer: int) -> MoE:
        gate, up, down = (
            tuple(self.matrix(f"expert_{part}", layer, e) for e in range(spec.num_experts))
            for part in ("gate", "up", "down")
        )
        shared = None
        if spec.shared_size:
            gates = (self.matrix("shared_router", layer),) if spec.shared_gate else ()
            shared = SharedExpert(
                mlp=self.mlp("shared_", spec.activation, layer),
                gate=Linear(weights=gates) if gates else None,
            )
        return MoE(
            router=Linear(weights=(self.matrix("router", layer),)),
            experts=ExpertWeights(gate=gate, up=up, down=down),
            shared=shared,
            activation=spec.activation,
            top_k=spec.top_k,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
        )
