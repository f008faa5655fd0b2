"""The native CPU back end: the compiled kernels as ops.

Chosen by the registry. Weights stay where they are (mapped files too): a call passes addresses.
Never falls back silently: `library.unfit_reason` says beforehand why the kernels cannot run.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.composed import Composed
from octavo.kernels.cpu.library import ISAS, SIGNATURES, load_library, supported_isas
from octavo.kernels.cpu.recording import Tape, watched
from octavo.kernels.cpu.structs import (
    SCORE_CODES,
    WEIGHTING_CODES,
    MoEStruct,
    RouteStruct,
    activation_struct,
    address_of,
    attention_op_struct,
    batch_struct,
    bias_addresses,
    expert_structs,
    head_size_of,
    kv_layer_struct,
    matrix_structs,
    prepared,
    qk_norm_struct,
    quantizing_struct,
    rope_struct,
)
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import ExpertWeights, Router, SharedExpert, Weight

_SIGMOID_RULE = RoutingRule(top_k=2, renormalize=False)
"""softmax([g, 0])[0] is sigmoid(g)."""


class Descriptors:
    """Addresses of C structs that describe frozen values, dropped with the values.

    Keyed by identity, since what a layer asks of attention is the same object at every step.
    Weights bring their structs along (`Ops.prepare`).
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


def _floats(x: Tensor) -> Tensor:
    """Returns x as contiguous float32; itself where it is that already."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.float().contiguous()


def _out_of_range(op: str) -> IndexError:
    return IndexError(f"{op}: a token id, position, slot, block or expert id is out of range")


def _destroy(library: ctypes.CDLL, pool: int, creator: int) -> None:
    # A forked child has the pool but not its threads: waiting for them would never end.
    if os.getpid() == creator:
        library.octavo_destroy(pool)


class NativeOps(Composed):
    """The ops of `octavo.kernels.ops.Ops` on `num_threads` threads of their own.

    `isa` is one of ISAS that the CPU has; None takes the best that computes in float32, or with
    `rounds_activations` one that rounds activations to bfloat16 before they are multiplied with
    weights in it, on CPUs where that is faster. With `rounds_to_int8` block formats are multiplied
    in integers, with activations rounded to int8 by blocks of 32 (int8.h).
    """

    name = "native"
    torch_threads = 1

    def __init__(
        self,
        num_threads: int,
        isa: str | None = None,
        *,
        rounds_activations: bool = False,
        rounds_to_int8: bool = False,
    ) -> None:
        self._library = load_library()
        self._functions = {name: getattr(self._library, f"octavo_{name}") for name in SIGNATURES}
        supported = supported_isas(self._library)
        rounds = rounds_activations and bool(self._library.octavo_prefers_bf16())
        fitting = [name for name in supported if rounds or name != "avx512_bf16"]
        self.isa = fitting[-1] if isa is None else isa
        assert self.isa in supported, f"this CPU has no {self.isa}"
        code = list(ISAS).index(self.isa)
        self._pool: int = self._library.octavo_create(max(1, num_threads), code, rounds_to_int8)
        self._structs = Descriptors()
        self._tape: Tape | None = None
        weakref.finalize(self, _destroy, self._library, self._pool, os.getpid())

    def _run(self, op: str, args: tuple[Any, ...], kept: tuple[Any, ...]) -> None:
        """Calls the compiled op; `kept` is what its addresses lie in."""
        if self._tape is not None:
            self._tape.add(op, args, kept)
        if self._functions[op](self._pool, *args):
            raise _out_of_range(op)

    def record(self, body: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        """See `StepRecorder`. One thread computes at that time."""
        assert self._tape is None, "a recording is under way"
        self._tape = tape = Tape()
        try:
            result, has_missed = watched(body)
        finally:
            self._tape = None
        return result, None if has_missed else self._replayed(tape)

    def _replayed(self, tape: Tape) -> Callable[[], None]:
        calls, replay, pool = tape.calls(), self._library.octavo_replay, self._pool

        def run() -> None:
            if failed := replay(pool, calls, len(calls)):
                raise _out_of_range(tape.names[failed - 1])

        return run

    def _struct(self, value: Any, describe: Callable[[Any], Any]) -> int:
        """Returns the address of what `describe` makes of `value`, made at the first call."""
        key = id(value)
        return self._structs.get(key) or self._structs.add(key, (value,), describe(value))

    def prepare(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        return prepared(weights)

    def prepare_experts(self, experts: ExpertWeights) -> ExpertWeights:
        return replace(experts, prepared=expert_structs(experts))

    def embedding(self, token_ids_T: Tensor, weight: Weight) -> Tensor:
        tokens = len(token_ids_T)
        ids = token_ids_T.to(torch.int32).contiguous()
        out = torch.empty(tokens, weight.cols)
        matrix = matrix_structs((weight,))
        args = ids.data_ptr(), tokens, ctypes.addressof(matrix), out.data_ptr()
        self._run("embedding", args, (ids, weight, matrix, out))
        return out

    def rms_norm(self, x_TM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        x, weight = _floats(x_TM), _floats(weight_M)
        tokens, size = x.shape
        assert weight.shape == (size,)
        out = torch.empty_like(x)
        args = x.data_ptr(), tokens, size, weight.data_ptr(), eps, out.data_ptr()
        self._run("rms_norm", args, (x, weight, out))
        return out

    def add_rms_norm(
        self, x_TM: Tensor, residual_TM: Tensor, weight_M: Tensor, eps: float
    ) -> Tensor:
        x, weight = _floats(x_TM), _floats(weight_M)
        tokens, size = x.shape
        assert (residual_TM.shape, weight.shape) == (x.shape, (size,))
        out = torch.empty_like(x)
        pointers = x.data_ptr(), address_of(residual_TM, torch.float32)
        args = *pointers, tokens, size, weight.data_ptr(), eps, out.data_ptr()
        self._run("add_rms_norm", args, (x, residual_TM, weight, out))
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
        matrices = matrix_structs(weights)
        where = ctypes.addressof(matrices), len(weights)
        args = x.data_ptr(), tokens, *where, bias, out.data_ptr()
        self._run("linear", args, (x, weights, matrices, bias_N, out))
        return out

    def gated_mlp(
        self, x_TM: Tensor, gate_up: Sequence[Weight], down: Weight, activation: Activation
    ) -> Tensor:
        x, (gate, up) = _floats(x_TM), gate_up
        tokens = len(x)
        assert x.shape[1] == gate.cols == up.cols
        assert gate.rows == up.rows == down.cols
        hidden, out = torch.empty(tokens, gate.rows), torch.empty(tokens, down.rows)
        kind, matrices = activation_struct(activation), matrix_structs((gate, up, down))
        where = ctypes.addressof(matrices), kind
        args = x.data_ptr(), tokens, *where, hidden.data_ptr(), out.data_ptr()
        self._run("gated_mlp", args, (x, gate, up, down, matrices, hidden, out))
        return out

    def route(
        self,
        logits_TE: Tensor,
        router: Router,
        counts_E: Tensor,
        num_live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert num_live is None, "nothing pads a step on the CPU"
        weights, ids = self._choose(
            logits_TE, router.rule, router.correction_E, router.scale_E, counts_E=counts_E
        )
        return weights, router.held_ids(ids)

    def _choose(
        self,
        logits_TE: Tensor,
        rule: RoutingRule,
        correction_E: Tensor | None = None,
        scale_E: Tensor | None = None,
        counts_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logits = _floats(logits_TE)
        tokens, experts = logits.shape
        assert 1 <= rule.top_k <= experts // rule.num_groups * rule.top_groups
        weights = torch.empty(tokens, rule.top_k)
        ids = torch.empty(tokens, rule.top_k, dtype=torch.int32)
        tensors = (
            None if tensor is None else address_of(tensor, torch.float32)
            for tensor in (correction_E, scale_E)
        )
        args = RouteStruct(
            *(logits.data_ptr(), *tensors, weights.data_ptr(), ids.data_ptr()),
            *(tokens, experts, rule.top_k, SCORE_CODES[rule.score], rule.num_groups),
            *(rule.top_groups, 2 if rule.group_score == "best_two" else 1),
            *(WEIGHTING_CODES[rule.weighting], int(rule.renormalize)),
            *(rule.sum_epsilon, rule.least_sum, rule.scale),
            None if counts_E is None else address_of(counts_E, torch.int64),
        )
        self._run("route", (args,), (logits, correction_E, scale_E, counts_E, weights, ids))
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
        biases, matrices = bias_addresses(experts), expert_structs(experts)
        args = MoEStruct(
            *(x.data_ptr(), ctypes.addressof(matrices)),
            *(weights.data_ptr(), ids.data_ptr()),
            *(order.data_ptr(), order.data_ptr() + 4 * picks, hidden.data_ptr()),
            *(parts.data_ptr(), out.data_ptr(), tokens, len(experts.gate), top_k),
            *biases,
            activation_struct(activation),
        )
        kept = x, experts, matrices, weights, ids, order, hidden, parts, out
        self._run("moe", (args,), kept)
        return self.add_shared(out, x, shared, gate_T1, activation)

    def rope_and_cache(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        qkv, tokens = _floats(qkv_TN), len(qkv_TN)
        assert (layer.key.shape[2], head_size_of(layer)) == (op.num_kv_heads, op.head_size)
        assert not layer.parts, "what has parts is written by others"
        assert qkv.shape[1] == (op.num_heads + 2 * op.num_kv_heads) * op.head_size
        assert tokens == len(batch.positions_T) == len(batch.slot_mapping_T)
        norm = None if op.qk_norm is None else self._struct(op.qk_norm, qk_norm_struct)
        table = None if op.rope is None else self._struct(op.rope, rope_struct)
        q = torch.empty(tokens, op.num_heads, op.head_size)
        where = self._struct(layer, kv_layer_struct), quantizing_struct(op)
        to = self._struct(batch, batch_struct), q.data_ptr()
        args = qkv.data_ptr(), op.num_heads, table, norm, *where, *to
        self._run("rope_and_cache", args, (qkv, op, layer, batch, q))
        return q

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        q = _floats(q_THD)
        tokens, heads, head_size = q.shape
        assert (tokens, head_size) == (len(batch.positions_T), head_size_of(layer))
        assert heads % layer.key.shape[2] == 0
        asked = self._struct(op, attention_op_struct)
        out = torch.empty(tokens, heads * head_size)
        where = self._struct(layer, kv_layer_struct), self._struct(batch, batch_struct)
        args = q.data_ptr(), heads, *where, asked, out.data_ptr()
        self._run("attention", args, (q, op, layer, batch, out))
        return out
