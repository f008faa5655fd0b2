"""The stored tensors of a quantised checkpoint, and the matrices that they make up.

Used by the families of formats and by `source`. Tensors are views of mapped files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from octavo.errors import WeightsError
from octavo.formats import WeightFormat
from octavo.weights.quantization import Quantization
from octavo.weights.schemes import Scheme
from octavo.weights.source import StoredTensor

RAW_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""By safetensors' names."""
_E8M0_NAN = 255
Fetch = Callable[[str, StoredTensor], Tensor]
"""Returns the tensor of a name in its stored type, as `view` does, on any device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A matrix that is stored in several tensors, or in one order and wanted in another."""

    shape: tuple[int, int]
    format: WeightFormat
    """As it is in memory; numbers (f32) where blocks cannot say what is stored."""
    read: Callable[[Fetch], tuple[Tensor, Tensor | None]]
    """Returns the rows, as `Weight.data`, and the table (on the host) of formats that have one; the
    tensors of `stored` it takes from Fetch, and computes where they are."""
    stored: tuple[StoredTensor, ...]
    has_row_scales: bool = False
    """Whether all scales of a row are one number."""
    unpacked_because: str | None = None
    """Why it is numbers in memory."""
    order: Tensor | None = None
    """See `Weight.order`."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a format wants of one tensor of a matrix."""

    types: tuple[str, ...]
    """Of safetensors' names."""
    ranks: tuple[int, ...] = (2,)
    is_needed: bool = True


NUMBERS = ("F32", "F16", "BF16")
OF_ACTIVATIONS = frozenset(
    "input_scale input_zero_point input_global_scale input_scale_ub activation_scale "
    "_activation_scale".split()
)
"""What is never read: activations are not quantised by what a checkpoint says."""


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one quantised matrix by their names below it."""

    name: str
    parts: Mapping[str, StoredTensor]
    separator: str = "."
    """What stands between the two names."""

    def check(self, wanted: Mapping[str, Part]) -> None:
        """Raises WeightsError unless the tensors are those of a format, in types and ranks."""
        for part, rule in wanted.items():
            if part not in self.parts and not rule.is_needed:
                continue
            found = self.stored(part)
            if found.format_name not in rule.types:
                self.refuse(
                    f"{part} has the type {found.format_name}, expected {' or '.join(rule.types)}"
                )
            if len(found.shape) not in rule.ranks:
                ranks = " or ".join(map(str, rule.ranks))
                self.refuse(
                    f"{part} has the shape {list(found.shape)}, expected {ranks} dimensions"
                )
            if 0 in found.shape:
                self.refuse(f"{part} has the shape {list(found.shape)}: there are no numbers in it")
        # Those of another format would be left out without a word.
        surplus = sorted(self.parts.keys() - wanted.keys() - OF_ACTIVATIONS)
        if surplus:
            self.refuse(
                f"{', '.join(surplus)} cannot stand beside {', '.join(sorted(wanted))}; check that "
                "config and weights belong together"
            )

    def tensor(self, part: str, fetch: Fetch | None = None) -> Tensor:
        """Returns a part where `fetch` has it, else a view. Raises WeightsError if it is missing or
        of an unknown type."""
        return (fetch or view)(self.full_name(part), self.stored(part))

    def full_name(self, part: str) -> str:
        return f"{self.name}{self.separator}{part}"

    def stored(self, part: str) -> StoredTensor:
        found = self.parts.get(part)
        if found is None:
            beside = self.full_name(next(iter(self.parts)))
            raise WeightsError(f"{self.full_name(part)} is missing beside {beside}")
        return found

    def shape(self, part: str) -> tuple[int, ...]:
        return self.stored(part).shape

    def expect(self, part: str, *shapes: tuple[int, ...]) -> None:
        """Raises WeightsError unless a part has one of the shapes."""
        found = self.shape(part)
        if found not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self.refuse(f"{part} has the shape {list(found)}, expected {wanted}")

    def refuse(self, why: str) -> NoReturn:
        raise WeightsError(f"{self.name}: {why}")


def allowed(
    module: Module,
    found: Scheme,
    quantization: Quantization,
    cols: int = 0,
    groups: int | None = None,
) -> Scheme | None:
    """Returns what the config says of a module's codes, None if nothing. Raises WeightsError if it
    says something else than `found`, in so many groups of `cols` columns."""
    schemes = quantization.schemes.of(module.name)
    fitting = [one for one in schemes if one.allows(found, cols, groups)]
    if not schemes or fitting:
        return fitting[0] if fitting else None
    in_groups = "" if groups is None else f" in {groups} groups of {-(-cols // groups)} columns"
    module.refuse(
        f"codes of {found}{in_groups}, and the config's quantization says "
        f"{' or '.join(dict.fromkeys(map(str, schemes)))}; check that config and weights belong "
        "together"
    )


def raw_dtype(name: str, stored: StoredTensor) -> torch.dtype:
    """Returns the type that a tensor is stored in. Raises WeightsError for one that is not
    known."""
    dtype = RAW_DTYPES.get(stored.format_name)
    if dtype is None:
        known = ", ".join(RAW_DTYPES)
        raise WeightsError(f"{name} has the type {stored.format_name}; known are {known}")
    return dtype


def raw_bytes(name: str, stored: StoredTensor) -> int:
    """Returns how many bytes a tensor takes. Raises WeightsError."""
    return math.prod(stored.shape) * raw_dtype(name, stored).itemsize


def one_of(name: str, stack: StoredTensor, index: int) -> StoredTensor:
    """Returns what a stack has at an index of its first dimension. Raises WeightsError."""
    one = replace(stack, shape=stack.shape[1:])
    return replace(one, start=stack.start + index * raw_bytes(name, one))


def view(name: str, stored: StoredTensor) -> Tensor:
    """Returns a tensor in its stored type, in the file. Raises WeightsError."""
    dtype = raw_dtype(name, stored)
    data = stored.file.view(stored.start, raw_bytes(name, stored))
    if stored.start % dtype.itemsize:
        data = data.clone()  # a header of odd length: numbers must start at their own size
    return data.view(dtype).view(stored.shape)


def check_scales(name: str, scales: Tensor) -> None:
    """Raises WeightsError for scales that are no numbers, or all zero; some may be zero: groups
    that are."""
    numbers = scales.float()
    are_finite, is_some = torch.isfinite(numbers).all(), numbers.any()
    if bool(are_finite & is_some):
        return
    what = "NaN or infinite" if not bool(are_finite) else "all zero"
    raise WeightsError(f"{name} has scales that are {what}; download the model again")


def check_exponents(name: str, exponents: Tensor) -> None:
    """The same of scales that are e8m0, uint8."""
    if bool((exponents == _E8M0_NAN).any()):
        raise WeightsError(f"{name} has scales that are NaN; download the model again")
