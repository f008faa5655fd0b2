"""Dense products with packed weights equal those with the values that their planes stand for."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.planes import pack_codes, pack_high, unpack_codes, values_of
from octavo.planes import PLANE_LAYOUTS
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.packed_cases import FLOAT_ERROR, error_of, planes

from octavo.kernels.triton.product.choose import multiply_packed  # isort: skip
from octavo.kernels.triton.product.fp8 import fp8_product  # isort: skip
from octavo.kernels.triton.product.packed import packed_matvec, packed_product, unpack  # isort: skip
from octavo.kernels.triton.product.packed_shapes import Fp8Shape, PackedShape, SumsShape  # isort: skip

ROWS = 20
KINDS = (
    "int4_128_f16",
    "int4_32_bf16",
    "int8_64",
    "fp8",
    "fp8_row",
    "q8_0",
    "q4_0",
    "q4_1",
    "mxfp4",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "nvfp4",
)


@pytest.mark.parametrize("name", KINDS)
def test_packed_products_equal_float64(name: str):
    layout, cols = PLANE_LAYOUTS[name], 160
    weight = planes(layout, ROWS, cols)
    values = values_of(layout, weight, cols).double()
    bias = torch.linspace(-1, 1, ROWS, device=DEVICE)
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for some in (x[:1], x):
        out = torch.empty(len(some), ROWS, device=DEVICE)
        multiply_packed(some, weight, layout, bias, out, is_deterministic=False)
        assert error_of(out, some.double() @ values.T + bias) < FLOAT_ERROR


@pytest.mark.parametrize("name", ["int4_32_f16", "int8_128", "q4_1", "fp8", "fp8_row", *KINDS[9:]])
def test_rows_are_unpacked_and_unknown_ones_are_nan(name: str):
    layout, cols = PLANE_LAYOUTS[name], 224
    weight = planes(layout, ROWS, cols)
    ids = torch.tensor([3, 19, -1, 20], dtype=torch.int32, device=DEVICE)
    found = unpack(weight, layout, cols, torch.float32, ids)
    assert torch.equal(found[:2], values_of(layout, weight, cols)[[3, 19]])
    assert bool(found[2:].isnan().all())


@pytest.mark.parametrize("name", ["fp8", "fp8_row", "int8_64", "q5_0"])
def test_one_row_is_summed_in_several_steps(name: str):
    layout, cols = PLANE_LAYOUTS[name], 352
    weight = planes(layout, ROWS, cols)
    x = torch.randn(1, cols, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    out = torch.empty(1, ROWS, device=DEVICE)
    shape = SumsShape(block_n=2, words=64, num_warps=2)
    packed_matvec(x, weight, layout, None, out, shape)
    assert error_of(out, x.double() @ values_of(layout, weight, cols).double().T) < FLOAT_ERROR


def test_several_steps_of_a_block_have_the_bits_of_single_ones():
    layout, cols = PLANE_LAYOUTS["int4_64_f16"], 256
    weight = planes(layout, ROWS, cols)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for block_k in (64, 256):
        out = torch.empty(3, ROWS, device=DEVICE)
        shape = PackedShape(block_t=16, block_n=32, block_k=block_k, num_warps=4, num_stages=2)
        packed_product(x, weight, layout, None, out, shape)
        found.append(out)
    assert torch.equal(*found)


def test_activations_in_fp8_come_close():
    layout, cols = PLANE_LAYOUTS["fp8_row"], 160
    weight = planes(layout, ROWS, cols)
    x = torch.randn(9, cols, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    out = torch.empty(9, ROWS, device=DEVICE)
    shape = Fp8Shape(block_t=16, block_n=32, block_k=128, num_warps=4, num_stages=2)
    fp8_product(x, weight, layout, None, out, shape)
    error = error_of(out, x.double() @ values_of(layout, weight, cols).double().T)
    assert 1e-3 < error < 4e-2


@pytest.mark.parametrize("name", ["int4_32_f16", "fp8", "q3_k", "q6_k"])
def test_words_give_their_codes_back(name: str):
    layout = PLANE_LAYOUTS[name]
    codes = torch.randint(0, 1 << layout.bits + layout.high, (3, 512), dtype=torch.uint8)
    words, high = pack_codes(layout, codes), pack_high(layout, codes)
    assert torch.equal(unpack_codes(layout, words, high), codes)
