"""What weights can be made when they are loaded, and random ones of published formats."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import ConfigError
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import values_of
from octavo.weights.dummy import DummySource
from octavo.weights.made import DUMMY_QUANTIZATIONS, can_be_made, made_format
from octavo.weights.placement import DevicePlacement
from octavo.weights.quantization import check_quantization
from octavo.weights.quantized import QuantizedSource

NAME = "model.layers.0.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize("kind", DUMMY_QUANTIZATIONS)
def test_random_weights_lie_in_a_published_format_on_host_and_device(kind: str):
    source = QuantizedSource(DummySource({NAME: (8, 512)}, "bfloat16", 0), kind)
    values = dequantize_rows(source.matrix(NAME), slice(0, 8))
    placement = DevicePlacement(source, torch.device("cpu"))
    (weight,) = placement.matrices({NAME: None})
    placement.finish()
    assert weight.planes is not None
    assert weight.layout is not None
    for some in (values, values_of(weight.layout, weight.planes, 512)):
        assert bool(some.isfinite().all())
        assert 0 < float(some.std()) < 1


def test_mixtures_spend_more_bits_where_llama_cpp_does():
    down = "model.layers.{}.mlp.experts.3.down_proj.weight"
    found = [made_format("q4_k_m", down.format(layer), (8, 512), 48) for layer in range(48)]
    names = [form.name for form in found if form is not None]
    assert names.count("q6_k") == 24
    assert names[:9] == ["q6_k"] * 6 + ["q4_k", "q4_k", "q6_k"]
    gate = made_format("q4_k_m", "model.layers.0.mlp.gate.weight", (8, 512), 48)
    assert gate is None
    head = made_format("q4_k_m", "lm_head.weight", (8, 512), 48)
    assert head is not None
    assert head.name == "q6_k"


def test_experts_alone_are_mxfp4():
    assert made_format("mxfp4", NAME, (8, 512), 1) is not None
    assert made_format("mxfp4", "model.layers.0.self_attn.q_proj.weight", (8, 512), 1) is None


def test_published_formats_are_for_random_weights_alone():
    assert can_be_made("q4_k_m", is_dummy=True)
    check_quantization("q4_k_m", None, is_dummy=True)
    with pytest.raises(ConfigError, match=r"random weights can.*can be made fp8, int8, int4"):
        check_quantization("q4_k_m", None)
