"""The native CPU back end: loads the compiled kernels through ctypes and offers them as ops.

Chosen by the registry. Weights stay where they are (mapped files too): a call passes addresses.
Never falls back silently: `unfit_reason` says beforehand why the kernels cannot run.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.activations import Activation, ClampedSwiGLU, PlainActivation
from octavo.kernels.composed import Composed
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer, QKNorm, RopeTable
from octavo.kernels.routing import ExpertWeighting, RoutingRule, Score
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight
from octavo.visibility import Window

_FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
FORMAT_CODES = {name: code for code, name in enumerate(_FORMATS)}
"""The order is that of `enum Format` in native.h."""
KV_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATION_CODES: dict[PlainActivation, int] = {"silu": 0, "gelu_tanh": 1}
_CLAMPED_SWIGLU = 2
SCORE_CODES: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "logit": 3}
WEIGHTING_CODES: dict[ExpertWeighting, int] = {"score": 0, "softmax": 1, "sigmoid": 2}
_SIGMOID_RULE = RoutingRule(top_k=2, renormalize=False)
"""softmax([g, 0])[0] is sigmoid(g)."""


def _fields(*names: str) -> list[tuple[str, Any]]:
    """Names that end in `*` are addresses, the others int64; all are 8 bytes."""
    return [(n.rstrip("*"), c_void_p if n.endswith("*") else c_int64) for n in names]


class _Matrix(ctypes.Structure):
    _fields_ = _fields("data*", "rows", "cols", "row_bytes", "format")


class _KVLayer(ctypes.Structure):
    _fields_ = _fields(
        *("key*", "value*", "key_stride", "value_stride"),
        *("blocks", "block_size", "kv_heads", "head_size", "format"),
    )


class _Batch(ctypes.Structure):
    _fields_ = _fields(
        *("positions*", "query_starts*", "seq_lens*", "block_table*", "slot_mapping*"),
        *("tokens", "sequences", "table_stride", "table_columns"),
    )


class _Rope(ctypes.Structure):
    _fields_ = _fields("cos*", "sin*", "positions", "rotary_dim")


class _QKNorm(ctypes.Structure):
    _fields_ = [*_fields("query*", "key*"), ("eps", c_double), ("per_head", c_int64)]


class _Activation(ctypes.Structure):
    _fields_ = [*_fields("kind"), ("alpha", c_double), ("limit", c_double)]


class _MoeArgs(ctypes.Structure):
    _fields_ = [
        *_fields("x*", "weights*", "topk_weights*", "topk_ids*", "order*", "slots*"),
        *_fields("hidden*", "parts*", "out*", "tokens", "experts", "top_k"),
        *_fields("gate_bias*", "up_bias*", "down_bias*"),
        ("activation", _Activation),
    ]


class _Route(ctypes.Structure):
    _fields_ = [
        *_fields("logits*", "correction*", "scales*", "weights*", "ids*"),
        *_fields("tokens", "experts", "top_k", "score", "groups", "top_groups", "group_best"),
        *_fields("weighting", "renormalize"),
        *(("sum_epsilon", c_double), ("least_sum", c_double), ("scale", c_double)),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "linear": [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p],
    "gated_mlp": [c_void_p, c_int64, c_void_p, POINTER(_Activation), c_void_p, c_void_p],
    "moe": [POINTER(_MoeArgs)],
    "embedding": [c_void_p, c_int64, c_void_p, c_void_p],
    "rms_norm": [c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p],
    "add_rms_norm": [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p],
    "route": [POINTER(_Route)],
    "rope_and_cache": [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p],
    "attention": [c_void_p, c_int64, c_void_p, c_void_p, c_double, c_int64, c_void_p],
}
"""Arguments after the pool; every op returns a status."""


def library_path() -> Path | None:
    """Returns where the compiled kernels lie, or None if they were not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if path.exists():
            return path
    return None


def _load() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise OSError(
            f"{Path(__file__).parent}/_native*.so is not built (no C++ compiler at install? "
            "build it with: python setup.py build_ext --inplace)"
        )
    library = ctypes.CDLL(str(path))
    library.octavo_is_supported.restype = c_int64
    library.octavo_isa.restype = c_char_p
    library.octavo_create.argtypes, library.octavo_create.restype = [c_int64], c_void_p
    library.octavo_destroy.argtypes, library.octavo_destroy.restype = [c_void_p], None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"octavo_{name}")
        function.argtypes, function.restype = [c_void_p, *arguments], c_int64
    return library


def unfit_reason() -> str | None:
    """Returns why the native kernels cannot run on this machine, or None if they can."""
    try:
        library = _load()
    except OSError as error:
        return str(error)
    if not library.octavo_is_supported():
        return f"the CPU lacks one of {library.octavo_isa().decode()}"
    return None


class _Descriptors:
    """Addresses of C structs that describe frozen values, dropped with the values.

    Keyed by identity, since a model's weights are the same objects at every step.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[int, Any, list[weakref.ref[Any]]]] = {}

    def get(self, key: Any) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def add(self, key: Any, values: Sequence[Any], block: Any) -> int:
        """Keeps `block` (a ctypes instance) while all `values` live; returns its address."""
        entries = self._entries

        def drop(_: object) -> None:
            entries.pop(key, None)

        address = ctypes.addressof(block)
        entries[key] = (address, block, [weakref.ref(value, drop) for value in values])
        return address


def _matrix(weight: Weight) -> _Matrix:
    data, form = weight.data, weight.format
    row_bytes = data.stride(0) * data.element_size()
    assert data.stride(1) == 1, "rows must be contiguous"
    shape = data.shape[0], data.shape[1] * data.element_size()
    assert shape == (weight.rows, form.row_bytes(weight.cols)), form.name
    code = FORMAT_CODES[form.name]
    return _Matrix(data.data_ptr(), weight.rows, weight.cols, row_bytes, code)


def _matrices(weights: Sequence[Weight]) -> ctypes.Array[_Matrix]:
    return (_Matrix * len(weights))(*map(_matrix, weights))


def _experts(experts: ExpertWeights) -> ctypes.Array[_Matrix]:
    first = experts.gate[0], experts.up[0], experts.down[0]
    for one in zip(experts.gate, experts.up, experts.down, strict=True):
        for weight, like in zip(one, first, strict=True):
            assert (weight.rows, weight.cols) == (like.rows, like.cols)
    return _matrices((*experts.gate, *experts.up, *experts.down))


def _activation(activation: Activation) -> _Activation:
    if isinstance(activation, ClampedSwiGLU):
        return _Activation(_CLAMPED_SWIGLU, activation.alpha, activation.limit)
    return _Activation(ACTIVATION_CODES[activation], 0.0, 0.0)


def _biases(experts: ExpertWeights) -> tuple[int | None, ...]:
    biases = experts.biases
    if biases is None:
        return None, None, None
    count, inner, outer = len(experts.gate), experts.gate[0].rows, experts.down[0].rows
    assert biases.gate_EF.shape == biases.up_EF.shape == (count, inner)
    assert biases.down_EM.shape == (count, outer)
    tensors = (biases.gate_EF, biases.up_EF, biases.down_EM)
    return tuple(_address(tensor, torch.float32) for tensor in tensors)


def _address(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype is dtype, f"{tensor.dtype} is not {dtype}"
    assert tensor.is_contiguous(), "must be contiguous"
    return tensor.data_ptr()


def _kv_layer(layer: KVLayer) -> _KVLayer:
    key, value = layer.key, layer.value
    blocks, block_size, kv_heads, head_size = key.shape
    inner = (kv_heads * head_size, head_size, 1)
    assert (value.shape, value.dtype) == (key.shape, key.dtype)
    assert (key.stride()[1:], value.stride()[1:]) == (inner, inner), "pages must be contiguous"
    item = key.element_size()
    strides = key.stride(0) * item, value.stride(0) * item
    shape = blocks, block_size, kv_heads, head_size
    return _KVLayer(key.data_ptr(), value.data_ptr(), *strides, *shape, KV_CODES[key.dtype])


def _attention_batch(batch: AttentionBatch) -> _Batch:
    table, sequences = batch.block_table, len(batch.seq_lens_S)
    assert (table.dtype, table.stride(1)) == (torch.int32, 1)
    assert len(table) >= sequences == len(batch.query_starts) - 1
    return _Batch(
        *(_address(t, torch.int32) for t in (batch.positions_T, batch.query_starts)),
        *(_address(batch.seq_lens_S, torch.int32), table.data_ptr()),
        *(_address(batch.slot_mapping_T, torch.int64), len(batch.positions_T), sequences),
        *(table.stride(0), table.shape[1]),
    )


def _rope(rope: RopeTable) -> _Rope:
    tables = rope.cos, rope.sin
    shape = len(rope.cos), rope.rotary_dim // 2
    assert all(table.shape == shape for table in tables)
    return _Rope(*(_address(t, torch.float32) for t in tables), len(rope.cos), rope.rotary_dim)


def _qk_norm(norm: QKNorm) -> _QKNorm:
    pointers = (_address(t, torch.float32) for t in (norm.query, norm.key))
    return _QKNorm(*pointers, norm.eps, int(norm.per_head))


def _floats(x: Tensor) -> Tensor:
    """Returns x as contiguous float32; itself where it is that already."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.float().contiguous()


def _check(status: int, op: str) -> None:
    if status:
        raise IndexError(f"{op}: a token id, position, slot, block or expert id is out of range")


def _destroy(library: ctypes.CDLL, pool: int, creator: int) -> None:
    # A forked child has the pool but not its threads: waiting for them would never end.
    if os.getpid() == creator:
        library.octavo_destroy(pool)


class NativeOps(Composed):
    """The ops of `octavo.kernels.ops.Ops` on `num_threads` threads of their own."""

    name = "native"
    torch_threads = 1

    def __init__(self, num_threads: int) -> None:
        self._library = _load()
        self._pool: int = self._library.octavo_create(max(1, num_threads))
        self._structs = _Descriptors()
        weakref.finalize(self, _destroy, self._library, self._pool, os.getpid())

    def _struct(self, value: Any, describe: Callable[[Any], Any]) -> int:
        """Returns the address of what `describe` makes of `value`, made at the first call."""
        key = id(value)
        return self._structs.get(key) or self._structs.add(key, (value,), describe(value))

    def _weights(self, weights: Sequence[Weight]) -> int:
        key = id(weights[0]) if len(weights) == 1 else tuple(map(id, weights))
        return self._structs.get(key) or self._structs.add(key, weights, _matrices(weights))

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        tokens = len(token_ids_T)
        ids = token_ids_T.to(torch.int32).contiguous()
        out = torch.empty(tokens, weight.cols)
        status = self._library.octavo_embedding(
            self._pool, ids.data_ptr(), tokens, self._weights((weight,)), out.data_ptr()
        )
        _check(status, "embedding")
        return out

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        x, weight = _floats(x_TM), _floats(weight_M)
        tokens, size = x.shape
        assert weight.shape == (size,)
        out = torch.empty_like(x)
        self._library.octavo_rms_norm(
            self._pool, x.data_ptr(), tokens, size, weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        x, weight = _floats(x_TM), _floats(weight_M)
        tokens, size = x.shape
        assert (residual_TM.shape, weight.shape) == (x.shape, (size,))
        out = torch.empty_like(x)
        pointers = x.data_ptr(), _address(residual_TM, torch.float32)
        self._library.octavo_add_rms_norm(
            self._pool, *pointers, tokens, size, weight.data_ptr(), eps, out.data_ptr()
        )
        return out

    def linear(
        self, x_TM: Tensor, weights: Sequence[Weight], bias_N: Tensor | None = None
    ) -> Tensor:
        x = _floats(x_TM)
        tokens, cols = x.shape
        columns = 0
        for weight in weights:
            assert weight.cols == cols, f"x has {cols} columns, a weight {weight.cols}"
            columns += weight.rows
        out = torch.empty(tokens, columns)
        bias = None
        if bias_N is not None:
            bias_N = _floats(bias_N)
            assert bias_N.shape == (columns,)
            bias = bias_N.data_ptr()
        matrices = self._weights(weights)
        self._library.octavo_linear(
            self._pool, x.data_ptr(), tokens, matrices, len(weights), bias, out.data_ptr()
        )
        return out

    def gated_mlp(
        self, x_TM: Tensor, gate: Weight, up: Weight, down: Weight, activation: Activation
    ) -> Tensor:
        x = _floats(x_TM)
        tokens = len(x)
        assert x.shape[1] == gate.cols == up.cols
        assert gate.rows == up.rows == down.cols
        hidden, out = torch.empty(tokens, gate.rows), torch.empty(tokens, down.rows)
        kind, matrices = _activation(activation), self._weights((gate, up, down))
        self._library.octavo_gated_mlp(
            self._pool, x.data_ptr(), tokens, matrices, kind, hidden.data_ptr(), out.data_ptr()
        )
        return out

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert num_live is None, "nothing pads a step on the CPU"
        weights, ids = self._choose(logits_TE, router.rule, router.correction_E, router.scale_E)
        counts_E += torch.bincount(ids.flatten(), minlength=len(counts_E))
        return weights, ids

    def _choose(
        self,
        logits_TE: Tensor,
        rule: RoutingRule,
        correction_E: Tensor | None = None,
        scale_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logits = _floats(logits_TE)
        tokens, experts = logits.shape
        assert 1 <= rule.top_k <= experts // rule.num_groups * rule.top_groups
        weights = torch.empty(tokens, rule.top_k)
        ids = torch.empty(tokens, rule.top_k, dtype=torch.int32)
        tensors = (
            None if tensor is None else _address(tensor, torch.float32)
            for tensor in (correction_E, scale_E)
        )
        args = _Route(
            *(logits.data_ptr(), *tensors, weights.data_ptr(), ids.data_ptr()),
            *(tokens, experts, rule.top_k, SCORE_CODES[rule.score], rule.num_groups),
            *(rule.top_groups, 2 if rule.group_score == "best_two" else 1),
            *(WEIGHTING_CODES[rule.weighting], int(rule.renormalize)),
            *(rule.sum_epsilon, rule.least_sum, rule.scale),
        )
        self._library.octavo_route(self._pool, args)
        return weights, ids

    def add_gated(self, out_TM: Tensor, x_TM: Tensor, gate_T1: Tensor | None) -> None:
        """torch.sigmoid takes its vectors in another way than what is left over at the end, so that
        a token's last bit would depend on its place in the batch."""
        if gate_T1 is None:
            out_TM += x_TM
            return
        logits = torch.cat((gate_T1, torch.zeros_like(gate_T1)), dim=1)
        weights, ids = self._choose(logits, _SIGMOID_RULE)
        out_TM += x_TM * torch.where(ids[:, :1] == 0, weights[:, :1], weights[:, 1:])

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
        x, weights = _floats(x_TM), _floats(topk_weights)
        ids = topk_ids.to(torch.int32).contiguous()
        tokens, top_k = ids.shape
        gate, down = experts.gate[0], experts.down[0]
        assert (x.shape, weights.shape) == ((tokens, gate.cols), ids.shape)
        assert gate.rows == down.cols
        picks = tokens * top_k
        order = torch.empty(2 * picks, dtype=torch.int32)
        hidden, parts = torch.empty(picks, gate.rows), torch.empty(picks, down.rows)
        out = torch.empty(tokens, down.rows)
        biases = _biases(experts)
        args = _MoeArgs(
            *(x.data_ptr(), self._struct(experts, _experts)),
            *(weights.data_ptr(), ids.data_ptr()),
            *(order.data_ptr(), order.data_ptr() + 4 * picks, hidden.data_ptr()),
            *(parts.data_ptr(), out.data_ptr(), tokens, len(experts.gate), top_k),
            *biases,
            _activation(activation),
        )
        _check(self._library.octavo_moe(self._pool, args), "moe")
        return self.add_shared(out, x, shared, gate_T1, activation)

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        assert op.rope is not None
        qkv, tokens = _floats(qkv_TN), len(qkv_TN)
        assert layer.key.shape[2:] == (op.num_kv_heads, op.head_size)
        assert qkv.shape[1] == (op.num_heads + 2 * op.num_kv_heads) * op.head_size
        assert tokens == len(batch.positions_T) == len(batch.slot_mapping_T)
        norm = None if op.qk_norm is None else self._struct(op.qk_norm, _qk_norm)
        table = self._struct(op.rope, _rope)
        q = torch.empty(tokens, op.num_heads, op.head_size)
        where = self._struct(layer, _kv_layer), self._struct(batch, _attention_batch)
        status = self._library.octavo_rope_and_cache(
            self._pool, qkv.data_ptr(), op.num_heads, table, norm, *where, q.data_ptr()
        )
        _check(status, "rope_and_cache")
        return q

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        q = _floats(q_THD)
        tokens, heads, head_size = q.shape
        assert (tokens, head_size) == (len(batch.positions_T), layer.key.shape[3])
        assert heads % layer.key.shape[2] == 0
        assert op.sinks_H is None
        assert op.soft_cap is None
        window = op.visibility.size if isinstance(op.visibility, Window) else 0
        out = torch.empty(tokens, heads * head_size)
        where = self._struct(layer, _kv_layer), self._struct(batch, _attention_batch)
        status = self._library.octavo_attention(
            self._pool, q.data_ptr(), heads, *where, op.scale, window, out.data_ptr()
        )
        _check(status, "attention")
        return out
