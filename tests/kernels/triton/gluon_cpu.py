"""Gluon's kernels run without a GPU, one program after the other: what they say, not how fast.

Used by tests of kernels that Triton's interpreter does not know. `load` reads a module again with
another language beneath it, whose tensors are torch's; layouts mean nothing there. Copies that a
kernel does not wait for come as early or as late as they may, as `is_late` says, so that a missing
wait or a slot that is filled too early shows.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from octavo.formats import TWICE_E2M1
from octavo.kernels.triton.tiles import codes
from octavo.planes import IQ4_VALUES, PLANE_LAYOUTS, PlaneLayout
from tests.kernels.triton.gluon_async import Barriers, Descriptor, warp_specialize
from tests.kernels.triton.gluon_values import TORCH, Machine, Shared, Value, data_of, mask_of, whole
from tests.kernels.triton.gluon_words import of_words

_EMULATED = "octavo.kernels.triton."
_OURS = ("tiles.", "hopper.")
"""Parts of the names of modules that are read again."""


class _Number(int):
    """A constant, which has its value as constants of Triton do."""

    @property
    def value(self) -> int:
        return int(self)


class _Text(str):
    @property
    def value(self) -> str:
        return str(self)


class _Tuple(tuple[Any, ...]):
    @property
    def value(self) -> tuple[Any, ...]:
        return tuple(self)


def _constant(value: Any) -> Any:
    kinds = {int: _Number, bool: _Number, str: _Text, tuple: _Tuple}
    return kinds.get(type(value), lambda one: one)(value)


def _layout(*arguments: Any, **named: Any) -> SimpleNamespace:
    """Returns what kernels ask of a layout: the warps of products, the shape of a linear one."""
    lists = [one for one in arguments if isinstance(one, list)]
    return SimpleNamespace(
        warps_per_cta=(lists or [[]])[min(1, len(lists) - 1)], shape=arguments[-1]
    )


class Language:
    """Stands for `triton.language` and Gluon's."""

    constexpr = staticmethod(_constant)
    warp_specialize = staticmethod(warp_specialize)
    static_range = range

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return _layout
        return getattr(tl, name)

    def program_id(self, axis: int) -> Value:
        return whole(self._machine.program[axis])

    def num_programs(self, axis: int) -> Value:
        return whole(self._machine.grid[axis])

    def num_warps(self) -> int:
        return self._machine.num_warps

    def arange(self, start: int, end: int, layout: object = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def zeros(self, shape: list[int], dtype: tl.dtype, layout: object = None) -> Value:
        return Value(torch.zeros(shape, dtype=TORCH[dtype]))

    def zeros_like(self, one: Value) -> Value:
        return Value(torch.zeros_like(one.data))

    def full(self, shape: list[int], value: Any, dtype: tl.dtype, layout: object = None) -> Value:
        return Value(torch.full(shape, float(data_of(value))).to(TORCH[dtype]))

    def where(self, mask: Any, first: Any, second: Any) -> Value:
        element = getattr(first, "element", None)
        chosen = torch.where(mask_of(mask), torch.as_tensor(data_of(first)), data_of(second))
        return Value(chosen, element)

    def minimum(self, a: Any, b: Any) -> Value:
        return Value(torch.minimum(torch.as_tensor(data_of(a)), torch.as_tensor(data_of(b))))

    def maximum(self, a: Any, b: Any) -> Value:
        return Value(torch.maximum(torch.as_tensor(data_of(a)), torch.as_tensor(data_of(b))))

    def max(self, x: Value, axis: int) -> Value:
        return Value(x.data.amax(axis))

    def sum(self, x: Value, axis: int) -> Value:
        return Value(x.data.sum(axis))

    def cdiv(self, x: Value, size: int) -> Value:
        return (x + (size - 1)) // size

    def abs(self, x: Value) -> Value:
        return Value(x.data.abs())

    def expand_dims(self, x: Value, axis: int) -> Value:
        return Value(x.data.unsqueeze(axis), x.element)

    def to_tensor(self, x: Any) -> Value:
        return x if isinstance(x, Value) else whole(x)

    def exp(self, x: Value) -> Value:
        return Value(x.data.exp())

    def exp2(self, x: Value) -> Value:
        return Value(x.data.exp2())

    def log2(self, x: Value) -> Value:
        return Value(x.data.log2())

    def join(self, a: Value, b: Value) -> Value:
        return Value(torch.stack((a.data, b.data), -1))

    def split(self, both: Value) -> tuple[Value, Value]:
        return Value(both.data[..., 0]), Value(both.data[..., 1])

    def convert_layout(self, one: Value, layout: object, assert_trivial: bool = False) -> Value:
        return one

    def load(self, at: Value, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Value:
        return Value(self._machine.load(at, mask_of(mask), other))

    def store(self, at: Value, value: Any, mask: Any = None) -> None:
        self._machine.store(at, torch.as_tensor(data_of(value)), mask_of(mask))

    def atomic_add(self, at: Value, value: int, sem: str) -> Value:
        before = self.load(at)
        self.store(at, before + value)
        return before

    def allocate_shared_memory(self, dtype: tl.dtype, shape: list[int], layout: object) -> Shared:
        fill = 77 if dtype.is_int() else float("nan")
        return Shared(torch.full(shape, fill).to(TORCH[dtype]))

    def static_assert(self, condition: Any) -> None:
        assert condition

    def thread_barrier(self) -> None: ...

    def inline_asm_elementwise(
        self, text: str, constraints: str, values: list[Value], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        if text.startswith("sub.rn"):
            a, b = values
            return Value((a.data.float() - b.data.float()).to(a.data.dtype))
        if text == "shr.b32 $0, $1, 8;":
            return Value(((values[0].data.int() & 0xFFFF) >> 8).to(torch.int16))
        if text in codes._TEXTS.values():
            return _codes(text, values, dtype)
        if text in codes._SMALL_TEXTS.values():
            return _small_codes(text, values)
        if text.endswith("mul.rn.bf16x2 $0, $1, g;\n}"):
            return Value((values[0].data.float() * 2.0**64).bfloat16())
        return of_words(text, values)


def _codes(text: str, values: list[Value], dtypes: tuple[tl.dtype, ...]) -> tuple[Value, ...]:
    """Returns what the instructions of `tiles/ptx.py` make of words, without them."""
    is_bf16 = dtypes[0] == tl.bfloat16
    name, sub = next(
        (name, sub)
        for (name, is_of_bf16, sub), one in codes._TEXTS.items()
        if one == text and is_of_bf16 == is_bf16
    )
    layout = PLANE_LAYOUTS[name]
    words, high = values[0].data.int(), values[-1].data.int()
    is_byte = layout.bits == 8 and is_bf16
    bias = 0 if layout.values != "uint" or is_byte else 128 if is_bf16 else 1024
    found = []
    for part in range(layout.parts):
        code = (words >> (layout.bits * part)) & ((1 << layout.bits) - 1)
        if layout.high:
            above = high >> (layout.high * (layout.parts * sub + part))
            code = code | (above & ((1 << layout.high) - 1)) << layout.bits
        number = _meanings(layout)[code] + bias
        found.append(Value(number.to(TORCH[dtypes[0]])))
    return tuple(found)


def _small_codes(text: str, values: list[Value]) -> tuple[Value, ...]:
    """As `_codes`, of numbers that stay too small."""
    name = next(name for name, one in codes._SMALL_TEXTS.items() if one == text)
    layout, words = PLANE_LAYOUTS[name], values[0].data.int()
    meanings = (_meanings(layout) * 2.0 ** -codes.SMALL[layout.values]).bfloat16()
    every = range(0, 16, layout.bits)
    return tuple(Value(meanings[(words >> at) & ((1 << layout.bits) - 1)]) for at in every)


def _meanings(layout: PlaneLayout) -> Tensor:
    """Returns what each code of a layout means."""
    every = torch.arange(1 << (layout.bits + layout.high))
    if layout.values == "e4m3":
        return every.to(torch.uint8).view(torch.float8_e4m3fn).float()
    if layout.values == "e2m1":
        return torch.tensor(TWICE_E2M1) / 2
    return torch.tensor(IQ4_VALUES).float() if layout.values == "iq4" else every.float()


def _product(a: Any, b: Any, total: Value, use_acc: bool = True, **options: object) -> Value:
    made = a.data.float() @ b.data.float()
    return Value(made + total.data if use_acc else made)


class Kernel:
    """Launched as ever: kernel[grid](*arguments, **constants)."""

    def __init__(self, function: Callable[..., None], machine: Machine) -> None:
        self._function, self._machine = function, machine

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, maxnreg: object = None, **constants: Any):
            machine = self._machine
            machine.num_warps = num_warps
            machine.tensors.clear()
            seen = [machine.pointer(one) for one in arguments]
            for program in product(*map(range, grid)):
                machine.program, machine.grid = program, grid
                machine.open, machine.groups = [], []
                self._function(*seen, **constants)
                assert not any(machine.groups), "copies that nobody waited for"

        return launch


def _jit(function: Any = None, **options: object) -> Any:
    return function if function is not None else lambda one: one


class Emulator:
    """Modules that are read again, each once."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._modules: dict[str, ModuleType] = {}
        language, barriers = Language(machine), Barriers(machine)
        jit = SimpleNamespace(jit=_jit, constexpr_function=lambda one: one, language=language)

        def commit() -> None:
            machine.groups.append(machine.open)
            machine.open = []

        copies = SimpleNamespace(
            async_copy_global_to_shared=lambda to, at, mask=None: machine.copy(
                to, at, mask_of(mask)
            ),
            commit_group=commit,
            wait_group=machine.wait,
        )
        nothing = SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
        hopper = SimpleNamespace(
            fence_async_shared=lambda: None,
            warpgroup_mma=_product,
            warpgroup_mma_wait=lambda left, deps: deps[0] if len(deps) == 1 else tuple(deps),
            mbarrier=barriers,
            tma=barriers,
        )
        knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
        self._stand_ins: dict[str, Any] = {
            "triton": SimpleNamespace(
                jit=_jit, constexpr_function=lambda one: one, language=language, knobs=knobs
            ),
            "triton.language": language,
            "triton.experimental": SimpleNamespace(gluon=jit),
            "triton.experimental.gluon": jit,
            "triton.experimental.gluon.language.nvidia.ampere": SimpleNamespace(
                async_copy=copies, mma_v2=_product
            ),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
            "triton.language.extra.cuda": nothing,
            "octavo.kernels.triton.launching.launchable": SimpleNamespace(
                launchable=lambda function: Kernel(function, machine)
            ),
        }

    def load(self, name: str) -> Any:
        """Returns the module called so, read again."""
        if name in self._stand_ins:
            return self._stand_ins[name]
        if not name.startswith(_EMULATED) or not any(part in name + "." for part in _OURS):
            return importlib.import_module(name)
        if name not in self._modules:
            found = importlib.util.find_spec(name)
            assert found is not None
            assert found.origin is not None
            module = self._modules[name] = ModuleType(name)
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
            source = Path(found.origin).read_text(encoding="utf-8")
            exec(compile(source, found.origin, "exec"), module.__dict__)
        return self._modules[name]

    def _import(
        self, name: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0
    ) -> Any:
        assert level == 0
        if not wanted:
            return self._stand_ins.get(name.split(".")[0]) or builtins.__import__(name)
        module = self.load(name)
        parts = {}
        for one in wanted:
            inner = f"{name}.{one}"
            is_module = inner in self._stand_ins or not hasattr(module, one)
            parts[one] = self.load(inner) if is_module else getattr(module, one)
        return SimpleNamespace(**parts)


def emulated(name: str, *, is_late: bool) -> Any:
    """Returns the module called `name` as one whose kernels run here."""
    return Emulator(Machine(is_late=is_late)).load(name)
