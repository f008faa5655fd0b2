"""The TensorSource of a quantised checkpoint: which tensors make up which matrix.

Called by `loader` with the tensors of the files. Decides by the tensors that are there, and refuses
what does not agree with the config. Activations are never quantised: their scales are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.formats import FP8, GROUP, WEIGHT_FORMATS, WeightFormat
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import FP8_ROW, PlaneLayout, plane_layout
from octavo.weights.laid_out import copy_packed
from octavo.weights.names import ExpertNames
from octavo.weights.published import floats, ints
from octavo.weights.published.repack import mxfp4_rows
from octavo.weights.published.tensors import (
    Fetch,
    Module,
    PackedMatrix,
    Part,
    check_exponents,
    one_of,
    raw_bytes,
    raw_dtype,
    view,
)
from octavo.weights.quantization import Method, Quantization
from octavo.weights.source import MappedSource, StoredTensor, part_of
from octavo.weights.stacked import experts_of
from octavo.weights.staging import Staging

Reader = Callable[[Module, Quantization], PackedMatrix]
_PARTS = frozenset(
    "qweight qzeros scales g_idx weight weight_packed weight_scale weight_scale_inv weight_shape "
    "weight_zero_point weight_g_idx weight_global_scale weight_scale_2 input_scale "
    "input_zero_point input_global_scale input_scale_ub activation_scale".split()
)
"""Last parts of the names of what a quantised matrix is made of."""
_MARKS = frozenset(("qweight", "weight_packed", "weight_scale", "weight_scale_inv"))
"""Those that no plain matrix has."""
_STACK = re.compile(
    r"(model\.layers\.(\d+)\.(?:mlp|feed_forward)\.experts\.(gate_up_proj|down_proj))"
    r"(_blocks|_scales|_scale_inv|_activation_scale|)"
)


class PackedSource:
    """Matrices in the formats of `octavo.formats`, the others as they are stored."""

    def __init__(self, plain: MappedSource, matrices: Mapping[str, PackedMatrix]) -> None:
        self._plain = plain
        self._matrices = dict(matrices)

    def names(self) -> frozenset[str]:
        return self._plain.names() | self._matrices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._matrices.get(name)
        return self._plain.shape(name) if found is None else found.shape

    def format(self, name: str) -> WeightFormat:
        found = self._matrices.get(name)
        return self._plain.format(name) if found is None else found.format

    def device_format(self, name: str) -> WeightFormat:
        return self.format(name)

    def matrix(self, name: str) -> Weight:
        found = self._matrices.get(name)
        if found is None:
            return self._plain.matrix(name)
        rows, cols = found.shape
        data, table = found.read(view)
        self.release(name)
        return Weight(
            data=data,
            format=found.format,
            rows=rows,
            cols=cols,
            table=table,
            order=found.order,
        )

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        if name in self._matrices:
            out.copy_(part_of(self.matrix(name).data, out, row, col))
        else:
            self._plain.copy_into(name, out, staging, row, col)

    def order(self, name: str) -> Tensor | None:
        found = self._matrices.get(name)
        return self._plain.order(name) if found is None else found.order

    def layout(self, name: str) -> PlaneLayout | None:
        found = self._matrices.get(name)
        if found is None:
            return self._plain.layout(name)
        if found.format is FP8 and found.has_row_scales:
            return FP8_ROW
        return plane_layout(found.format.name)

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        found, layout = self._matrices.get(name), self.layout(name)
        if found is None:
            self._plain.copy_planes(name, out, staging, row, cols)
            return
        assert layout is not None
        fetched = {stored: _fetched(name, stored, staging) for stored in found.stored}
        with staging.converting:
            _convert(found, lambda _, stored: fetched[stored], layout, out, row, cols)

    def vector(self, name: str) -> Tensor:
        return self._plain.vector(name)

    def release(self, name: str) -> None:
        """Gives pages back to the system, as `MappedSource.release`."""
        found = self._matrices.get(name)
        if found is None:
            self._plain.release(name)
            return
        for stored in found.stored:
            stored.file.release(stored.start, raw_bytes(name, stored))

    @property
    def nbytes(self) -> int:
        all_packed = self._matrices.values()
        packed = (one.format.row_bytes(one.shape[1]) * one.shape[0] for one in all_packed)
        return self._plain.nbytes + sum(packed)

    def check_packed(self) -> None:
        """Raises UnsupportedModelError if a matrix would lie in memory as numbers."""
        for name, one in self._matrices.items():
            if one.unpacked_because is not None:
                raise UnsupportedModelError(
                    f"{name} cannot stay packed: {one.unpacked_because}; unpack the model when it "
                    "is loaded, with --dtype bfloat16"
                )


def _fetched(name: str, stored: StoredTensor, staging: Staging) -> Tensor:
    data = staging.fetch(stored.file, stored.start, raw_bytes(name, stored))
    return data.view(raw_dtype(name, stored)).view(stored.shape)


def _convert(
    matrix: PackedMatrix, fetch: Fetch, layout: PlaneLayout, out: Planes, row: int, cols: range
) -> None:
    rows, width = matrix.shape
    data, table = matrix.read(fetch)
    weight = Weight(data=data, format=matrix.format, rows=rows, cols=width, table=table)
    copy_packed(weight, layout, out, row, cols)


def packed_source(
    tensors: Mapping[str, StoredTensor], names: ExpertNames, quantization: Quantization
) -> PackedSource:
    """Returns the matrices that `tensors` make up. Raises WeightsError where they do not fit each
    other or the config."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    stacks: dict[tuple[str, str, str], dict[str, StoredTensor]] = {}
    plain: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if stack := _STACK.fullmatch(name):
            stacks.setdefault((stack[1], stack[2], stack[3]), {})[stack[4]] = stored
        elif part in _PARTS:
            modules.setdefault(module, {})[part] = stored
        else:
            plain[name] = stored
    matrices: dict[str, PackedMatrix] = {}
    for name, parts in modules.items():
        if parts.keys() & _MARKS:
            read = _reader(name, parts, quantization.method)
            matrices[f"{name}.weight"] = read(Module(name, parts), quantization)
        else:
            plain |= {f"{name}.{part}": stored for part, stored in parts.items()}
    for (name, layer, part), parts in stacks.items():
        found = dict(_stack(Module(name, parts, ""), layer, part, names, quantization))
        matrices |= found
        if not found:
            plain |= {f"{name}{suffix}": stored for suffix, stored in parts.items()}
    if not matrices and not quantization.may_be_plain:
        raise WeightsError(
            f"the config says that the model is quantised with {quantization.method}, and no "
            "tensor is; check that config and weights belong together"
        )
    return PackedSource(_plain_source(plain, names), matrices)


def _plain_source(tensors: Mapping[str, StoredTensor], names: ExpertNames) -> MappedSource:
    listed = (one for name, stored in tensors.items() for one in experts_of(name, stored, names))
    return MappedSource(dict(listed))


def _reader(name: str, parts: Mapping[str, StoredTensor], method: Method) -> Reader:
    """Returns what reads a module, by its tensors. Raises WeightsError if the config disagrees."""
    types = {part: stored.format_name for part, stored in parts.items()}
    weight = types.get("weight")
    packed = types.get("weight_packed")
    rows: tuple[tuple[bool, Reader, tuple[Method, ...]], ...] = (
        ("qweight" in types and method == "awq", ints.awq, ("awq",)),
        ("qweight" in types, ints.gptq, ("gptq",)),
        (packed == "I32", ints.pack_quantized, ("compressed-tensors",)),
        ("weight_global_scale" in types, floats.nvfp4, ("compressed-tensors",)),
        (packed == "U8", floats.mxfp4, ("compressed-tensors",)),
        ("weight_scale_2" in types, floats.nvfp4, ("modelopt",)),
        (weight == "F8_E4M3", floats.fp8, ("fp8", "compressed-tensors", "modelopt")),
        (weight == "I8", ints.int_quantized, ("compressed-tensors",)),
    )
    for is_so, reader, methods in rows:
        if is_so and method in methods:
            return reader
    found = ", ".join(f"{part} {kind}" for part, kind in sorted(types.items()))
    raise WeightsError(
        f"{name} has {found}, which the config's quant_method {method} does not make; check that "
        "config and weights belong together"
    )


def _stack(
    stack: Module, layer: str, part: str, names: ExpertNames, quantization: Quantization
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the experts of a quantised stack; nothing for one that is not quantised."""
    if "_blocks" in stack.parts:
        yield from _mxfp4_experts(stack, layer, part, names)
    elif "_scale_inv" in stack.parts:
        yield from _fp8_experts(stack, layer, part, names, quantization)


def _mxfp4_experts(
    stack: Module, layer: str, part: str, names: ExpertNames
) -> Iterator[tuple[str, PackedMatrix]]:
    """gpt-oss: blocks uint8 [E, rows, K / 32, 16], scales uint8 [E, rows, K / 32]; the rows of gate
    and up take turns."""
    blocks, scales = stack.stored("_blocks"), stack.stored("_scales")
    stack.check({"_blocks": Part(("U8",), (4,)), "_scales": Part(floats.EXPONENTS, (3,))})
    if blocks.shape[3] != GROUP // 2:
        stack.refuse(f"blocks of the shape {list(blocks.shape)}, expected [E, rows, K / 32, 16]")
    stack.expect("_scales", blocks.shape[:3])
    count, rows, groups, _ = blocks.shape
    parts = ("gate", "up") if part == "gate_up_proj" else ("down",)

    def read(mine: Sequence[StoredTensor], first: int, fetch: Fetch) -> tuple[Tensor, None]:
        pairs, exponents = (
            fetch(stack.name, one).view(torch.uint8)[first :: len(parts)] for one in mine
        )
        check_exponents(stack.name, exponents)
        return mxfp4_rows(pairs.flatten(1), exponents), None

    for expert in range(count):
        mine = tuple(one_of(stack.name, one, expert) for one in (blocks, scales))
        for first, one in enumerate(parts):
            yield (
                names.expert(layer, expert, one),
                PackedMatrix(
                    shape=(rows // len(parts), groups * GROUP),
                    format=floats.MXFP4,
                    read=partial(read, mine, first),
                    stored=mine,
                ),
            )


def _fp8_experts(
    stack: Module, layer: str, part: str, names: ExpertNames, quantization: Quantization
) -> Iterator[tuple[str, PackedMatrix]]:
    """transformers' stacks: numbers [E, 2F, M] and [E, M, F], and for each expert the scales of a
    matrix; or of gate and up apart, where their rows are no whole blocks."""
    if names.layout != "rows":
        stack.refuse("a stack of FP8 whose matrices are transposed cannot be read yet")
    stack.check({"": Part(("F8_E4M3",), (3,)), "_scale_inv": Part(floats.FP8_SCALES, (3,))})
    numbers, scales = stack.stored(""), stack.stored("_scale_inv")
    count, rows, cols = numbers.shape
    parts = ("gate", "up") if part == "gate_up_proj" else ("down",)
    height = rows // len(parts)
    block = quantization.block or (128, 128)
    in_blocks = len(parts) * -(-height // block[0])
    is_apart = scales.shape[1] == in_blocks != -(-rows // block[0])
    is_apart |= scales.shape[1:] == (2, 1) == (len(parts), 1)  # one number each
    of_one = (height, cols) if is_apart else (rows, cols)
    grid = scales.shape[1] // len(parts) if is_apart else scales.shape[1]
    block = floats.fp8_block(stack.name, of_one, (grid, *scales.shape[2:]), quantization)
    why = floats.fp8_unpacked_because(cols, block[1])
    is_packed = why is None

    def read(mine: Sequence[StoredTensor], index: int, fetch: Fetch) -> tuple[Tensor, None]:
        found, of = (fetch(stack.name, one) for one in mine)
        rows = slice(index * height, (index + 1) * height)
        first = grid * index if is_apart else 0
        by_row = of.float()[first:][_scale_rows(rows, block[0], is_apart)]
        one = (1, block[1])
        return floats.fp8_values(stack.name, found[rows], by_row, one, is_packed), None

    for expert in range(count):
        mine = tuple(one_of(stack.name, one, expert) for one in (numbers, scales))
        for index, one in enumerate(parts):
            yield (
                names.expert(layer, expert, one),
                PackedMatrix(
                    shape=(height, cols),
                    format=FP8 if is_packed else WEIGHT_FORMATS["f32"],
                    read=partial(read, mine, index),
                    stored=mine,
                    unpacked_because=why,
                ),
            )


def _scale_rows(rows: slice, height: int, is_apart: bool) -> list[int]:
    """Returns which row of scales each row has, from the first of its own grid on."""
    first = 0 if is_apart else rows.start
    return [(first + row) // height for row in range(rows.stop - rows.start)]
