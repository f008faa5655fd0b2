"""The Triton back end: the ops of `octavo.kernels.ops.Ops` on the device of their tensors.

Built by the registry. Launches on torch's current stream and never waits for the device.
Weights are numbers (f32, f16, bf16), or packed ones in planes (`octavo.planes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.cells import KEPT_BLOCKS
from octavo.kernels.composed import Composed
from octavo.kernels.inputs import (
    AttentionBatch,
    AttentionOp,
    KVLayer,
    LatentOp,
    NormInput,
    Routed,
)
from octavo.kernels.planning import AttentionPlanner, PlanLimits, PlannedGroup
from octavo.kernels.triton.attention.choose import attended, attention
from octavo.kernels.triton.attention.decode import decode_attention, seq_len_bound
from octavo.kernels.triton.attention.device_plan import plan_of
from octavo.kernels.triton.attention.hopper import lone
from octavo.kernels.triton.attention.plan import MIN_SAVED_BYTES, StepPlanner
from octavo.kernels.triton.attention.shared import shared_prefix_attention
from octavo.kernels.triton.attention.write import rope_and_cache
from octavo.kernels.triton.experts import route as routes
from octavo.kernels.triton.experts.choose import run_experts
from octavo.kernels.triton.experts.ordered import with_rows_in_order
from octavo.kernels.triton.experts.route_by_rule import route_by_rule
from octavo.kernels.triton.experts.stacks import StackedExperts, stacked_experts
from octavo.kernels.triton.latent.choose import latent_attention, latent_views
from octavo.kernels.triton.launching.chip import num_processors
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.choose import (
    multiply,
    multiply_packed,
    norm_fp8_product,
    takes_normed,
)
from octavo.kernels.triton.product.grids import unpack_blocks
from octavo.kernels.triton.product.matrices import matrices_of, numbers_of, prepared
from octavo.kernels.triton.product.norm_matvec import MAX_COLUMNS, norm_matvec, norm_route
from octavo.kernels.triton.product.packed import unpack
from octavo.kernels.triton.product.shapes import norm_rows_shape
from octavo.kernels.triton.small import activation as activations
from octavo.kernels.triton.small import embedding as embeddings
from octavo.kernels.triton.small import norm as norms
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight


class TritonOps(Composed):
    """The ops in Triton. Activations have the dtype of the embedding; sums are float32."""

    name = "triton"

    def __init__(
        self, num_threads: int, *, is_deterministic: bool, shapes: Shapes | None = None
    ) -> None:
        """With `is_deterministic` all dense products are Triton's and split no sum, and attention
        splits keys by a row's own length, so that a row has the same bits in every batch by
        construction; else the vendor's library multiplies for many tokens, and `matvec.py` for
        one."""
        self.torch_threads = num_threads
        self._is_deterministic = is_deterministic
        self._shapes = shapes or Shapes()
        self._tickets: Tensor | None = None

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        if weight.planes is not None and weight.layout is not None:
            return unpack(weight.planes, weight.layout, weight.cols, torch.bfloat16, token_ids_T)
        if weight.format.name in KEPT_BLOCKS:
            return unpack_blocks(weight, torch.bfloat16, token_ids_T)
        return embeddings.embedding(token_ids_T, numbers_of(weight))

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        return norms.rms_norm(x_TM, None, weight_M, eps)

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        return norms.rms_norm(x_TM, residual_TM, weight_M, eps)

    def prepare(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        return prepared(weights)

    def prepare_experts(self, experts: ExpertWeights) -> ExpertWeights:
        experts = with_rows_in_order(experts)
        return replace(experts, prepared=stacked_experts(experts))

    def linear(
        self, x_TM: Tensor, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> Tensor:
        matrices = matrices_of(weights)
        rows = [_rows_of(matrix) for matrix in matrices]
        out = x_TM.new_empty((x_TM.shape[0], sum(rows)))
        if len(matrices) == 1:
            self._multiply(x_TM, matrices[0], bias_N, out)
            return out
        column = 0
        for matrix, count in zip(matrices, rows, strict=True):
            columns = slice(column, column + count)
            bias = None if bias_N is None else bias_N[columns]
            self._multiply(x_TM, matrix, bias, out[:, columns])
            column = columns.stop
        return out

    def norm_linear(
        self, rows: NormInput, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        matrices = matrices_of(weights)
        first = matrices[0]
        if len(matrices) == 1 and isinstance(first, Weight) and self._is_rounded(rows, first):
            return norm_fp8_product(rows, first, bias_N, self._tickets_on(rows.residual_TM.device))
        if not self._is_lone(rows.residual_TM) or len(matrices) > 1 or isinstance(first, Weight):
            return super().norm_linear(rows, weights, bias_N)
        return norm_matvec(rows, first, bias_N, norm_rows_shape(first.shape[1]))

    def _is_rounded(self, rows: NormInput, weight: Weight) -> bool:
        """Whether normed rows become FP8 within the norm, as their product alone takes them."""
        return not self._is_deterministic and takes_normed(rows, weight)

    def _is_lone(self, row_TM: Tensor) -> bool:
        """Whether one row runs alone, in kernels that give it other bits than a batch would."""
        num_tokens, hidden_size = row_TM.shape
        return num_tokens == 1 and hidden_size <= MAX_COLUMNS and not self._is_deterministic

    def _multiply(
        self,
        x_TM: Tensor,
        matrix_NM: Tensor | Weight,
        bias_N: Tensor | None,
        out: Tensor,
        *,
        by_vendor: bool = True,
    ) -> None:
        if isinstance(matrix_NM, Weight) and matrix_NM.planes is None:
            matrix_NM = unpack_blocks(matrix_NM, x_TM.dtype)
        if isinstance(matrix_NM, Weight):
            assert matrix_NM.planes is not None
            assert matrix_NM.layout is not None
            if matrix_NM.order is not None:
                x_TM = x_TM.index_select(1, matrix_NM.order)
            multiply_packed(
                *(x_TM, matrix_NM.planes, matrix_NM.layout, bias_N, out),
                self._tickets_on(out.device),
                is_deterministic=self._is_deterministic,
                is_by_tile=matrix_NM.is_by_tile,
            )
            return
        multiply(
            x_TM,
            matrix_NM,
            bias_N,
            out,
            self._shapes,
            self._tickets_on(out.device),
            is_deterministic=self._is_deterministic,
            by_vendor=by_vendor,
        )

    def gated_mlp(
        self, x_TM: Tensor, gate_up: Sequence[Weight], down: Weight, activation: Activation
    ) -> Tensor:
        # Nothing holds gate and up while the output is made: of many tokens they are large.
        hidden = activations.activate_and_mul(self.linear(x_TM, gate_up), activation)
        return self.linear(hidden, (down,))

    def logits(self, x_SM: Tensor, weight: Weight) -> Tensor:
        (matrix,) = matrices_of((weight,))
        out = torch.empty(len(x_SM), weight.rows, dtype=torch.float32, device=x_SM.device)
        self._multiply(x_SM, matrix, None, out, by_vendor=False)
        return out

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if router.is_plain:
            return routes.route(logits_TE, router, counts_E, num_live)
        return route_by_rule(logits_TE, router, counts_E, num_live)

    def norm_route(
        self, rows: NormInput, router: Router, counts_E: Tensor, num_live: Tensor | None = None
    ) -> Routed:
        matrices = matrices_of(router.weights)
        first = matrices[0]
        is_fused = router.is_softmax and len(matrices) == 1 and not isinstance(first, Weight)
        if not is_fused or not self._is_lone(rows.residual_TM):
            return super().norm_route(rows, router, counts_E, num_live)
        tickets = self._tickets_on(counts_E.device)
        return norm_route(rows, router, first, counts_E, num_live, tickets)

    def add_gated(self, out_TM: Tensor, x_TM: Tensor, gate_T1: Tensor | None) -> None:
        activations.add_gated(out_TM, x_TM, gate_T1)

    def moe(
        self,
        x_TM: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        experts: ExpertWeights,
        activation: Activation,
        shared: SharedExpert | None = None,
        gate_T1: Tensor | None = None,
        *,
        in_parts: bool = False,
    ) -> Tensor:
        stacked = experts.prepared
        if not isinstance(stacked, StackedExperts):
            stacked = stacked_experts(experts)
        out, is_whole = run_experts(
            x_TM,
            topk_weights,
            topk_ids,
            stacked,
            activation,
            shared,
            gate_T1,
            self._shapes,
            self._tickets_on(x_TM.device),
            is_deterministic=self._is_deterministic,
            in_parts=in_parts,
        )
        return out if is_whole else self.add_shared(out, x_TM, shared, gate_T1, activation)

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        return rope_and_cache(qkv_TN, op, layer, batch)

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        tickets, prefix = self._tickets_on(q_THD.device), plan_of(batch).prefix
        if prefix is not None and not self._is_deterministic:
            return shared_prefix_attention(q_THD, op, layer, batch, prefix, tickets)
        return attention(
            *(q_THD, op, layer, batch), is_deterministic=self._is_deterministic, tickets=tickets
        )

    def rope_attention(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        num_tokens, plan = len(qkv_TN), plan_of(batch)
        is_decode = num_tokens == len(batch.seq_lens_S) and 1 in (num_tokens, plan.max_query_len)
        if (
            not is_decode
            or self._is_deterministic
            or not (op.qk_norm is None or op.qk_norm.per_head)
            or plan.prefix is not None
            or lone.fits(qkv_TN, op, layer)
        ):
            return super().rope_attention(qkv_TN, op, layer, batch)
        out = qkv_TN.new_empty((num_tokens, op.num_heads, op.head_size))
        decode_attention(
            *(qkv_TN.view(num_tokens, -1, op.head_size), op, layer, batch, out),
            max_seq_len=seq_len_bound(layer, batch),
            is_qkv=True,
            tickets=self._tickets_on(out.device),
        )
        return attended(out, layer)

    def prepare_latent(self, kv_b: Weight, num_heads: int, nope_size: int) -> object:
        return latent_views(numbers_of(kv_b), num_heads, nope_size)

    def latent_attention(
        self, q_TN: Tensor, latent_TC: Tensor, op: LatentOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        return latent_attention(
            *(q_TN, latent_TC, op, layer, batch),
            is_deterministic=self._is_deterministic,
            tickets=self._tickets_on(q_TN.device),
        )

    def planner(
        self, groups: Sequence[PlannedGroup], limits: PlanLimits, device: torch.device
    ) -> AttentionPlanner:
        # Who shares a prefix in attention decides on bits.
        least = None if self._is_deterministic else MIN_SAVED_BYTES
        return StepPlanner(groups, limits, num_processors(device), min_saved_bytes=least)

    def _tickets_on(self, device: torch.device) -> Tensor:
        if self._tickets is None:
            self._tickets = make_tickets(device)
        return self._tickets


def _rows_of(matrix: Tensor | Weight) -> int:
    return matrix.rows if isinstance(matrix, Weight) else matrix.shape[0]
