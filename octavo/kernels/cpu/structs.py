"""What native.h takes by address: C structs, and how they are made of the values of ops.

Used by `native.py`. A struct has addresses of tensors: whoever makes one keeps those alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.formats import KV_FORMATS, WEIGHT_FORMATS
from octavo.kernels.activations import Activation, ClampedSwiGLU, PlainActivation
from octavo.kernels.inputs import (
    AttentionBatch,
    AttentionOp,
    KVLayer,
    QKNorm,
    RopeTable,
)
from octavo.kernels.kv_codec import stored_format
from octavo.kernels.routing import ExpertWeighting, Score
from octavo.kernels.weights import ExpertWeights, Together, Weight
from octavo.visibility import Chunk, Full, Visibility, Window

FORMAT_CODES = {name: code for code, name in enumerate(WEIGHT_FORMATS)}
"""The order is that of `enum Format` in native.h."""
KV_CODES = {name: code for code, name in enumerate(KV_FORMATS)}
"""The order is that of `enum KVFormat` in native.h."""
ACTIVATION_CODES: dict[PlainActivation, int] = {"silu": 0, "gelu_tanh": 1}
_CLAMPED_SWIGLU = 2
SCORE_CODES: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "logit": 3}
WEIGHTING_CODES: dict[ExpertWeighting, int] = {"score": 0, "softmax": 1, "sigmoid": 2}


def fields(*names: str) -> list[tuple[str, Any]]:
    """Names that end in `*` are addresses, the others int64; all are 8 bytes."""
    return [(n.rstrip("*"), c_void_p if n.endswith("*") else c_int64) for n in names]


class MatrixStruct(ctypes.Structure):
    _fields_ = fields("data*", "rows", "cols", "row_bytes", "format", "table*")


class KVPlaneStruct(ctypes.Structure):
    _fields_ = fields("data*", "scales*", "stride", "scale_stride", "num_scales", "format")


class KVLayerStruct(ctypes.Structure):
    _fields_ = [
        *(("key", KVPlaneStruct), ("value", KVPlaneStruct)),
        *fields("blocks", "block_size", "kv_heads", "head_size", "first_part"),
    ]


class QuantizingStruct(ctypes.Structure):
    _fields_ = fields("key_scales*", "value_scales*", "key_shift*", "key_factor*")


class BatchStruct(ctypes.Structure):
    _fields_ = fields(
        *("positions*", "query_starts*", "seq_lens*", "block_table*", "slot_mapping*"),
        *("tokens", "sequences", "table_stride", "table_columns"),
    )


class RopeStruct(ctypes.Structure):
    _fields_ = fields("cos*", "sin*", "positions", "rotary_dim")


class AttentionOpStruct(ctypes.Structure):
    _fields_ = [
        *(("scale", c_double), ("soft_cap", c_double)),
        *fields("sinks*", "visibility", "visible_size"),
    ]


class QKNormStruct(ctypes.Structure):
    _fields_ = [*fields("query*", "key*"), ("eps", c_double), ("per_head", c_int64)]


class ActivationStruct(ctypes.Structure):
    _fields_ = [*fields("kind"), ("alpha", c_double), ("limit", c_double)]


class MoEStruct(ctypes.Structure):
    _fields_ = [
        *fields("x*", "weights*", "topk_weights*", "topk_ids*", "order*", "slots*"),
        *fields("hidden*", "parts*", "out*", "tokens", "experts", "top_k"),
        *fields("gate_bias*", "up_bias*", "down_bias*"),
        ("activation", ActivationStruct),
    ]


class RouteStruct(ctypes.Structure):
    _fields_ = [
        *fields("logits*", "correction*", "scales*", "weights*", "ids*"),
        *fields("tokens", "experts", "top_k", "score", "groups", "top_groups", "group_best"),
        *fields("weighting", "renormalize"),
        *(("sum_epsilon", c_double), ("least_sum", c_double), ("scale", c_double)),
        *fields("counts*"),
    ]


def prepared(weights: Sequence[Weight]) -> Together:
    """Returns weights with their structs, each and all of them side by side."""
    structs = (MatrixStruct * len(weights))(*map(matrix_struct, weights))
    made = (replace(one, prepared=struct) for one, struct in zip(weights, structs, strict=True))
    return Together(weights=tuple(made), prepared=structs)


def matrix_struct(weight: Weight) -> MatrixStruct:
    """Returns the struct that was prepared, or makes it."""
    if isinstance(weight.prepared, MatrixStruct):
        return weight.prepared
    data, form = weight.data, weight.format
    row_bytes = data.stride(0) * data.element_size()
    assert data.stride(1) == 1, "rows must be contiguous"
    shape = data.shape[0], data.shape[1] * data.element_size()
    assert shape == (weight.rows, form.row_bytes(weight.cols)), form.name
    code, table = FORMAT_CODES[form.name], weight.table
    assert (0 if table is None else len(table)) == form.table_size, form.name
    pointer = None if table is None else address_of(table, torch.float32)
    return MatrixStruct(data.data_ptr(), weight.rows, weight.cols, row_bytes, code, pointer)


def matrix_structs(weights: Sequence[Weight]) -> ctypes.Array[MatrixStruct] | MatrixStruct:
    """Returns the structs of weights, one after the other in memory."""
    if isinstance(weights, Together) and isinstance(weights.prepared, ctypes.Array):
        return weights.prepared
    if len(weights) == 1:
        return matrix_struct(weights[0])
    return (MatrixStruct * len(weights))(*map(matrix_struct, weights))


def expert_structs(experts: ExpertWeights) -> ctypes.Array[MatrixStruct]:
    if isinstance(experts.prepared, ctypes.Array):
        return experts.prepared
    first = experts.gate[0], experts.up[0], experts.down[0]
    for one in zip(experts.gate, experts.up, experts.down, strict=True):
        for weight, like in zip(one, first, strict=True):
            assert (weight.rows, weight.cols) == (like.rows, like.cols)
    all_weights = (*experts.gate, *experts.up, *experts.down)
    return (MatrixStruct * len(all_weights))(*map(matrix_struct, all_weights))


def activation_struct(activation: Activation) -> ActivationStruct:
    if isinstance(activation, ClampedSwiGLU):
        return ActivationStruct(_CLAMPED_SWIGLU, activation.alpha, activation.limit)
    return ActivationStruct(ACTIVATION_CODES[activation], 0.0, 0.0)


def bias_addresses(experts: ExpertWeights) -> tuple[int | None, ...]:
    biases = experts.biases
    if biases is None:
        return None, None, None
    count, inner, outer = len(experts.gate), experts.gate[0].rows, experts.down[0].rows
    assert biases.gate_EF.shape == biases.up_EF.shape == (count, inner)
    assert biases.down_EM.shape == (count, outer)
    tensors = (biases.gate_EF, biases.up_EF, biases.down_EM)
    return tuple(address_of(tensor, torch.float32) for tensor in tensors)


def address_of(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype is dtype, f"{tensor.dtype} is not {dtype}"
    assert tensor.is_contiguous(), "must be contiguous"
    return tensor.data_ptr()


def head_size_of(layer: KVLayer) -> int:
    """Returns how many numbers a vector has."""
    packed = layer.key.shape[3]
    return 2 * packed if layer.key.dtype is torch.uint8 else packed


def kv_layer_struct(layer: KVLayer) -> KVLayerStruct:
    blocks, block_size, kv_heads, _ = layer.key.shape
    head_size = head_size_of(layer)
    assert len(layer.parts) in (0, 2), "a vector has one part or two"
    first_part = layer.parts[0] if layer.parts else 0
    planes = (
        _plane_struct(numbers, scales, head_size)
        for numbers, scales in ((layer.key, layer.key_scale), (layer.value, layer.value_scale))
    )
    return KVLayerStruct(*planes, blocks, block_size, kv_heads, head_size, first_part)


def _plane_struct(numbers: Tensor, scales: Tensor | None, head_size: int) -> KVPlaneStruct:
    stored = stored_format(numbers)
    for tensor in (numbers,) if scales is None else (numbers, scales):
        heads, width = tensor.shape[2:]
        assert tensor.stride()[1:] == (heads * width, width, 1), "pages must be contiguous"
    item = numbers.element_size()
    assert numbers.shape[3] * item * 8 == head_size * stored.bits
    assert stored.is_quantized == (scales is not None)
    pointer, stride, num_scales = None, 0, 0
    if scales is not None:
        assert scales.dtype is torch.bfloat16
        pointer, stride, num_scales = scales.data_ptr(), scales.stride(0) * 2, scales.shape[3]
    strides = numbers.stride(0) * item, stride
    return KVPlaneStruct(numbers.data_ptr(), pointer, *strides, num_scales, KV_CODES[stored.name])


def quantizing_struct(op: AttentionOp) -> QuantizingStruct:
    scales, change = op.kv_scales, op.key_change
    tensors = (None, None) if scales is None else (scales.key_K, scales.value_K)
    changes = (None, None) if change is None else (change.shift_KD, change.factor_KD)
    assert all(t is None or t.shape == (op.num_kv_heads, op.head_size) for t in changes)
    pointers = (None if t is None else address_of(t, torch.float32) for t in (*tensors, *changes))
    return QuantizingStruct(*pointers)


def batch_struct(batch: AttentionBatch) -> BatchStruct:
    table, sequences = batch.block_table, len(batch.seq_lens_S)
    assert (table.dtype, table.stride(1)) == (torch.int32, 1)
    assert len(table) >= sequences == len(batch.query_starts) - 1
    return BatchStruct(
        *(address_of(t, torch.int32) for t in (batch.positions_T, batch.query_starts)),
        *(address_of(batch.seq_lens_S, torch.int32), table.data_ptr()),
        *(address_of(batch.slot_mapping_T, torch.int64), len(batch.positions_T), sequences),
        *(table.stride(0), table.shape[1]),
    )


def rope_struct(rope: RopeTable) -> RopeStruct:
    tables = rope.cos, rope.sin
    shape = len(rope.cos), rope.rotary_dim // 2
    assert all(table.shape == shape for table in tables)
    return RopeStruct(
        *(address_of(t, torch.float32) for t in tables), len(rope.cos), rope.rotary_dim
    )


def attention_op_struct(op: AttentionOp) -> AttentionOpStruct:
    code, size = _visibility(op.visibility)
    sinks = op.sinks_H
    assert sinks is None or sinks.shape == (op.num_heads,)
    assert op.soft_cap is None or op.soft_cap > 0
    pointer = None if sinks is None else address_of(sinks, torch.float32)
    return AttentionOpStruct(op.scale, op.soft_cap or 0.0, pointer, code, size)


def _visibility(visibility: Visibility) -> tuple[int, int]:
    """Returns the code of `enum Visibility` in native.h, and the size."""
    match visibility:
        case Full():
            return 0, 0
        case Window(size):
            return 1, size
        case Chunk(size):
            return 2, size


def qk_norm_struct(norm: QKNorm) -> QKNormStruct:
    pointers = (address_of(t, torch.float32) for t in (norm.query, norm.key))
    return QKNormStruct(*pointers, norm.eps, int(norm.per_head))
