"""Spares Triton's interpreter what it makes anew at every operation and is always the same.

Imported by interpreter.py alone. What is computed stays as it is: types of blocks, shapes of
tensors and numbers of Python are remembered, comparisons of a thing with itself end early.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

from triton.language import core, semantic
from triton.runtime import interpreter

_Shape = tuple[int, ...]


@cache
def _block_shape(sizes: _Shape) -> tuple[Any, int, str]:
    shape = core.tuple(list(sizes))
    return shape, core.validate_block_shape(shape), str(shape)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, named = _block_shape(sizes)
    self.name = f"<{named}, {element_ty}>"


core.block_type.__init__ = _init_block_type


@cache
def _tensor_shape(sizes: _Shape) -> tuple[Any, Any]:
    return core.tuple([core.constexpr(s) for s in sizes]), core.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _tensor_shape(tuple(type.shape.values) if type.is_block() else ())


core.tensor.__init__ = _init_tensor

_equal_types = core.dtype.__eq__


def _is_equal_type(self: Any, other: Any) -> bool:
    return self is other or _equal_types(self, other)


core.dtype.__eq__ = _is_equal_type

_unwrap = core._unwrap_if_constexpr


def _unwrap_if_constexpr(value: Any) -> Any:
    return value.value if isinstance(value, core.constexpr) else _unwrap(value)


core._unwrap_if_constexpr = _unwrap_if_constexpr

_Semantic = semantic.TritonSemantic
_broadcast = _Semantic.broadcast_impl_value


def _broadcast_what_differs(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


_Semantic.broadcast_impl_value = _broadcast_what_differs

_check_operands = _Semantic.binary_op_type_checking_impl


def _operands(
    self: Any,
    lhs: Any,
    rhs: Any,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> tuple[Any, Any]:
    is_one_type = type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype
    # A division may widen halves; pointers are refused there.
    if is_one_type and not div_or_mod and not lhs.dtype.is_ptr():
        return self.broadcast_impl_value(lhs, rhs)
    allowed = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
    return _check_operands(self, lhs, rhs, *allowed)


_Semantic.binary_op_type_checking_impl = _operands

_computation_type = _Semantic.computation_type_impl
_of_interpreter = _Semantic(interpreter.interpreter_builder)


@cache
def _remembered_type(*asked: Any) -> Any:
    return _computation_type(_of_interpreter, *asked)


_Semantic.computation_type_impl = lambda self, *asked: _remembered_type(*asked)

_constant = _Semantic.scalar_constant


@lru_cache(maxsize=4096)
def _number(kind: type, value: Any, dtype: Any) -> Any:
    return _constant(_of_interpreter, value, dtype).handle.data


def _scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
    if self.builder is not interpreter.interpreter_builder or dtype is None:
        return _constant(self, value, dtype)
    # Not the handle: a shift replaces the data of its operands' handles.
    handle = interpreter.TensorHandle(_number(type(value), value, dtype), dtype)
    return self.tensor(handle, dtype)


_Semantic.scalar_constant = _scalar_constant


def _fits(array: Any, dtype: Any) -> bool:
    return isinstance(dtype, core.pointer_type) or array.itemsize * 8 <= max(
        8, dtype.primitive_bitwidth
    )


interpreter._validate_np_data_size = _fits


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = _of_interpreter
        return member(*args, **kwargs)

    scope.set_attr(obj, name, call)


interpreter._patch_attr = _patch_attr
