"""The Triton back end: the ops of `octavo.kernels.ops.Ops` on the device of their tensors.

Built by the registry. Launches on torch's current stream and never waits for the device.
Weights are numbers (f32, f16, bf16); GGUF block formats need the CPU back end for now.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.activations import Activation
from octavo.kernels.composed import Composed
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, NormInput, Routed
from octavo.kernels.triton.attention.choose import attention
from octavo.kernels.triton.attention.decode import decode_attention, seq_len_bound
from octavo.kernels.triton.attention.shared import shared_prefix_attention
from octavo.kernels.triton.attention.short_chunks import ShortPlans
from octavo.kernels.triton.attention.write import rope_and_cache
from octavo.kernels.triton.experts import route as routes
from octavo.kernels.triton.experts.moe import SharedParts, StackedExperts, add_biases, run_moe
from octavo.kernels.triton.experts.moe_few import SHARED_TOKENS, is_few, moe_of_few
from octavo.kernels.triton.experts.route_by_rule import route_by_rule
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.linear import product
from octavo.kernels.triton.product.matvec import matvec, moe_of_pairs
from octavo.kernels.triton.product.norm_matvec import (
    MAX_COLUMNS,
    norm_matvec,
    norm_route,
    plan_norm_matvec,
)
from octavo.kernels.triton.small import activation as activations
from octavo.kernels.triton.small import embedding as embeddings
from octavo.kernels.triton.small import norm as norms
from octavo.kernels.triton.tuning.plans import Plans
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight

SKINNY_TOKENS = 64
"""Up to here Triton multiplies: as fast as cuBLAS, which splits the sum there (H100, 2026-11-22).
Above, and for row counts that 8 divides, cuBLAS gave Triton's bits in all but one shape."""


class TritonOps(Composed):
    """The ops in Triton. Activations have the dtype of the embedding; sums are float32."""

    name = "triton"

    def __init__(
        self, num_threads: int, *, is_deterministic: bool, plans: Plans | None = None
    ) -> None:
        """With `is_deterministic` all dense products are Triton's and split no sum, and attention
        splits keys by a row's own length, so that a row has the same bits in every batch by
        construction; else the vendor's library multiplies for many tokens, and `matvec.py` for
        one."""
        self.torch_threads = num_threads
        self._is_deterministic = is_deterministic
        self._plans = plans or Plans()
        self._tickets: Tensor | None = None
        self._short_plans = ShortPlans()
        self._matrices: dict[tuple[Weight, ...], list[Tensor]] = {}
        """What `_merged` made of weights that were multiplied side by side."""
        self._stacks: weakref.WeakKeyDictionary[ExpertWeights, StackedExperts] = (
            weakref.WeakKeyDictionary()
        )

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        return embeddings.embedding(token_ids_T, _numbers(weight))

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        return norms.rms_norm(x_TM, None, weight_M, eps)

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        return norms.rms_norm(x_TM, residual_TM, weight_M, eps)

    def linear(
        self, x_TM: Tensor, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> Tensor:
        matrices = self._matrices_of(weights)
        out = x_TM.new_empty((x_TM.shape[0], sum([matrix.shape[0] for matrix in matrices])))
        if len(matrices) == 1:
            self._product(x_TM, matrices[0], bias_N, out)
            return out
        column = 0
        for matrix in matrices:
            columns = slice(column, column + matrix.shape[0])
            bias = None if bias_N is None else bias_N[columns]
            self._product(x_TM, matrix, bias, out[:, columns])
            column = columns.stop
        return out

    def _matrices_of(self, weights: Sequence[Weight]) -> list[Tensor]:
        key = tuple(weights)
        matrices = self._matrices.get(key)
        if matrices is None:
            matrices = self._matrices[key] = _merged([_numbers(weight) for weight in key])
        return matrices

    def norm_linear(
        self, rows: NormInput, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        matrices = self._matrices_of(weights)
        if not self._is_lone(rows.residual_TM) or len(matrices) > 1:
            return super().norm_linear(rows, weights, bias_N)
        plan = plan_norm_matvec(matrices[0].shape[1])
        return norm_matvec(rows, matrices[0], bias_N, plan)

    def _is_lone(self, row_TM: Tensor) -> bool:
        """Whether one row runs alone, in kernels that give it other bits than a batch would."""
        num_tokens, hidden_size = row_TM.shape
        return num_tokens == 1 and hidden_size <= MAX_COLUMNS and not self._is_deterministic

    def _product(self, x_TM: Tensor, matrix_NM: Tensor, bias: Tensor | None, out: Tensor) -> None:
        is_same = x_TM.dtype == matrix_NM.dtype
        num_tokens, num_rows = x_TM.shape[0], matrix_NM.shape[0]
        is_odd = num_rows % 8 != 0
        if num_tokens == 1 and not self._is_deterministic:
            matvec(x_TM, matrix_NM, bias, out, self._plans.rows(x_TM, matrix_NM))
        elif not is_same or self._is_deterministic or is_odd or num_tokens <= SKINNY_TOKENS:
            self._triton_product(x_TM, matrix_NM, bias, out)
        elif bias is None:
            torch.mm(x_TM, matrix_NM.T, out=out)
        else:
            torch.addmm(bias.to(x_TM.dtype), x_TM, matrix_NM.T, out=out)

    def _triton_product(
        self, x_TM: Tensor, matrix_NM: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        plan = self._plans.product(x_TM, matrix_NM)
        if self._is_deterministic:
            plan = plan.in_one_order()
        product(x_TM, matrix_NM, bias, out, plan, self._tickets_on(out.device))

    def gated_mlp(
        self, x_TM: Tensor, gate: Weight, up: Weight, down: Weight, activation: Activation
    ) -> Tensor:
        both = self.linear(x_TM, (gate, up))
        return self.linear(activations.activate_and_mul(both, activation), (down,))

    def logits(self, x_SM: Tensor, weight: Weight) -> Tensor:
        matrix = _numbers(weight)
        out = torch.empty(len(x_SM), len(matrix), dtype=torch.float32, device=x_SM.device)
        if len(x_SM) == 1 and not self._is_deterministic:
            matvec(x_SM, matrix, None, out, self._plans.rows(x_SM, matrix))
        else:
            self._triton_product(x_SM, matrix, None, out)
        return out

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if router.is_plain:
            rule = router.rule
            return routes.route(logits_TE, rule.top_k, rule.renormalize, counts_E, num_live)
        return route_by_rule(logits_TE, router, counts_E, num_live)

    def norm_route(
        self, rows: NormInput, router: Router, counts_E: Tensor, num_live: Tensor | None = None
    ) -> Routed:
        matrices = self._matrices_of(router.weights)
        is_fused = router.is_plain and len(matrices) == 1
        if not is_fused or not self._is_lone(rows.residual_TM):
            return super().norm_route(rows, router, counts_E, num_live)
        tickets = self._tickets_on(counts_E.device)
        return norm_route(rows, router, matrices[0], counts_E, num_live, tickets)

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
        stacked, biases = self._stacks.get(experts), experts.biases
        if stacked is None:
            stacked = StackedExperts(
                gate_EFM=stacked_view(experts.gate),
                up_EFM=stacked_view(experts.up),
                down_EMF=stacked_view(experts.down),
                gate_bias_EF=None if biases is None else biases.gate_EF,
                up_bias_EF=None if biases is None else biases.up_EF,
            )
            self._stacks[experts] = stacked
        top_k, inner_size = topk_ids.shape[1], stacked.gate_EFM.shape[1]
        plan = self._plans.moe(x_TM, top_k, stacked)
        is_of_pairs = plan.is_direct and not self._is_deterministic
        most = 1 if is_of_pairs else SHARED_TOKENS
        parts = None
        if len(x_TM) <= most and is_few(topk_ids) and not self._is_deterministic:
            parts = shared_parts(shared, gate_T1, inner_size)
        is_whole = shared is None or parts is not None
        in_parts = in_parts and is_whole and biases is None
        chosen = (x_TM, topk_weights, topk_ids, stacked, activation)
        if is_of_pairs:
            pairs = self._plans.pairs(x_TM, top_k, stacked)
            out = moe_of_pairs(*chosen, pairs, parts)
        elif is_few(topk_ids):
            out = moe_of_few(*chosen, plan, parts, in_parts=in_parts)
        else:
            out = run_moe(*chosen, plan, in_parts=in_parts)
        if biases is not None:
            add_biases(out, topk_weights, topk_ids, biases.down_EM)
        if is_whole:
            return out
        return self.add_shared(out, x_TM, shared, gate_T1, activation)

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        return rope_and_cache(qkv_TN, op, layer, batch)

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        tickets, plans = self._tickets_on(q_THD.device), self._short_plans
        if batch.prefix is not None and not self._is_deterministic:
            return shared_prefix_attention(q_THD, op, layer, batch, batch.prefix, tickets, plans)
        return attention(
            *(q_THD, op, layer, batch),
            is_deterministic=self._is_deterministic,
            tickets=tickets,
            plans=plans,
        )

    def rope_attention(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        num_tokens = len(qkv_TN)
        is_decode = num_tokens == len(batch.seq_lens_S) and 1 in (num_tokens, batch.max_query_len)
        if (
            not is_decode
            or self._is_deterministic
            or not (op.qk_norm is None or op.qk_norm.per_head)
            or batch.prefix is not None
        ):
            return super().rope_attention(qkv_TN, op, layer, batch)
        out = qkv_TN.new_empty((num_tokens, op.num_heads, op.head_size))
        decode_attention(
            *(qkv_TN.view(num_tokens, -1, op.head_size), op, layer, batch, out),
            max_seq_len=seq_len_bound(layer, batch),
            is_qkv=True,
            tickets=self._tickets_on(out.device),
        )
        return out.flatten(1)

    def _tickets_on(self, device: torch.device) -> Tensor:
        if self._tickets is None:
            self._tickets = make_tickets(device)
        return self._tickets


def shared_parts(
    shared: SharedExpert | None, gate_T1: Tensor | None, inner_size: int
) -> SharedParts | None:
    """Returns the shared expert as experts of `inner_size`, or None where it is not some of them
    side by side."""
    if shared is None or shared.gate.rows % inner_size:
        return None
    gate, up, down = _numbers(shared.gate), _numbers(shared.up), _numbers(shared.down)
    assert gate.is_contiguous()
    assert up.is_contiguous()
    assert down.is_contiguous()
    count = len(gate) // inner_size
    return SharedParts(gate_NM=gate, up_NM=up, down_MN=down, gate_T1=gate_T1, count=count)


def stacked_view(weights: Sequence[Weight]) -> Tensor:
    """Returns the experts' matrices as one [E, rows, cols] view.

    Raises AssertionError where they are not views at one constant stride of one tensor: the
    loader must put a layer's experts into one stack.
    """
    tensors = [_numbers(weight) for weight in weights]
    first = tensors[0]
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    stride = tensors[1].storage_offset() - start if len(tensors) > 1 else first.numel()
    for expert, tensor in enumerate(tensors):
        is_at = tensor.untyped_storage().data_ptr() == storage
        is_at = is_at and tensor.storage_offset() == start + expert * stride
        is_at = is_at and (expert == 0 or stride >= first.numel())
        is_at = is_at and tensor.shape == first.shape and tensor.dtype == first.dtype
        is_at = is_at and tensor.is_contiguous()
        assert is_at, (
            f"expert {expert} of {len(tensors)} does not lie at a constant stride from expert 0 "
            "in the same tensor; load the experts of a layer as views of one [E, rows, cols] stack"
        )
    return first.as_strided((len(tensors), *first.shape), (stride, *first.stride()), start)


def _numbers(weight: Weight) -> Tensor:
    if weight.format.is_block:
        raise UnsupportedModelError(
            f"weights in {weight.format.name} cannot be multiplied by the triton back end: GGUF "
            "block formats need the CPU back end for now (bf16, f16 and f32 run here)"
        )
    return weight.data


def _merged(tensors: list[Tensor]) -> list[Tensor]:
    """Joins matrices that follow each other in one storage, so that one product serves all."""
    merged = tensors[:1]
    for tensor in tensors[1:]:
        last = merged[-1]
        follows = (
            tensor.dtype == last.dtype
            and last.is_contiguous()
            and tensor.is_contiguous()
            and tensor.shape[1] == last.shape[1]
            and tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and tensor.storage_offset() == last.storage_offset() + last.numel()
        )
        if follows:
            rows = len(last) + len(tensor)
            merged[-1] = last.as_strided((rows, last.shape[1]), last.stride())
        else:
            merged.append(tensor)
    return merged
