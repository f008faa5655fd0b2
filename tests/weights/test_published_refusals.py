"""What tensors and config of a quantised checkpoint do not say alike is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.errors import ConfigError, UnsupportedModelError, WeightsError
from octavo.weights.quantization import check_kv_cache, check_quantization, read_quantization
from tests.weights.packing import Written, gptq
from tests.weights.published_cases import CASES, CT, NAME, named, opened

BAD: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "of another method": ({"quant_method": "awq"}, lambda t: None, "quant_method awq does not"),
    "missing scale": (
        {"quant_method": CT},
        lambda t: t.pop("weight_scale"),
        r"o_proj\.weight_scale is missing",
    ),
    "scale of another group": (
        {"quant_method": CT},
        lambda t: t.update(weight_scale=torch.ones(39, 2)),
        "39 rows, not 40",
    ),
    "NaN": (
        {"quant_method": CT},
        lambda t: t.update(weight_scale=torch.full((40, 2), float("nan"))),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    config, harm, message = BAD[case]
    written = CASES["packed"][0](np.random.default_rng(0))
    tensors = dict(written.tensors)
    harm(tensors)
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, named(Written(tensors, written.values)), config).matrix(f"{NAME}.weight")


SURPLUS = {
    "weight_zero_point": torch.ones(1, 1, dtype=torch.int8),
    "weight_scale_inv": torch.tensor([2.0]),
    "weight_scale_2": torch.tensor(2.0),
    "qzeros": torch.zeros(2, 2, dtype=torch.int32),
}
OPTIONAL = {
    "packed": {"weight_zero_point"},
    "packed out of order": {"weight_zero_point"},
    "packed 8 bits": {"weight_zero_point"},
}
LEFT_OUT = {"g_idx", "weight_g_idx", "weight_zero_point"}
"""What a format need not have."""


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_to_be_there_in_its_type_and_rank_and_no_other(
    case: str, tmp_path: Path
) -> None:
    make, config, _ = CASES[case]
    written = make(np.random.default_rng(0))
    if case == "int8":  # whose zeros may be there
        written.tensors["weight_zero_point"] = torch.zeros(33, 1, dtype=torch.int8)

    def refused(tensors: dict[str, Tensor], words: str) -> None:
        with pytest.raises(WeightsError, match=words):
            opened(tmp_path, named(Written(tensors, written.values)), config)

    for part, tensor in written.tensors.items():
        rest = {name: one for name, one in written.tensors.items() if name != part}
        if part not in LEFT_OUT:
            refused(rest, r"is missing beside|has .* does not make|no tensor is|has the type")
        other = torch.zeros(tensor.shape, dtype=torch.int16)
        refused(rest | {part: other}, rf"{part} has the type I16|{part} I16.* does not make")
        deep = tensor[None, None, None]
        refused(rest | {part: deep}, rf"{part} has the shape \[1, 1, 1.*expected")
    for part, tensor in SURPLUS.items():
        if part not in written.tensors.keys() | OPTIONAL.get(case, set()):
            refused(written.tensors | {part: tensor}, "cannot stand beside")


def test_fp8_with_exponents_for_32_columns_is_not_taken_for_fp8(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.ones(8, 64).to(torch.float8_e4m3fn),
        "weight_scale": torch.full((8, 2), 120, dtype=torch.uint8),
    }
    with pytest.raises(WeightsError, match="weight_scale has the type U8, expected F32 or"):
        opened(tmp_path, named(Written(tensors, torch.ones(8, 64))), {"quant_method": CT})


def test_columns_out_of_order_are_refused_where_the_config_says_that_none_are(
    tmp_path: Path,
) -> None:
    written = gptq(np.random.default_rng(1), 32, 128, 32, 4, less_one=True, reordered=True)
    source = opened(tmp_path, named(written), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(WeightsError, match="g_idx is out of order, and the config says desc_act"):
        source.matrix(f"{NAME}.weight")


def _zero(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].zero_()


DISAGREEING: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "scales of zero": ("awq 128", {}, _zero("scales"), "scales that are all zero"),
    "awq of another group": ("awq 128", {"group_size": 64}, lambda t: None, "2 groups of 128.* 64"),
    "gptq of other bits": ("gptq 4 bits", {"bits": 8}, lambda t: None, "codes of 4 bits.* says 8"),
    "packed in other bits": (
        "packed 8 bits",
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}},
        lambda t: None,
        "codes of 8 bits.* says 4",
    ),
    "packed in another group": (
        "packed",
        {"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 32}}}},
        lambda t: None,
        "2 groups of 128 columns.* says integers, groups of 32",
    ),
    "fp8 where 4 bits are said": (
        "fp8 by tensor",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda t: None,
        "codes of 8 bits.* says 4",
    ),
    "fp8 where a mixture says 4 bits": (
        "fp8 by tensor",
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {NAME: {"quant_algo": "NVFP4"}},
        },
        lambda t: None,
        "codes of 8 bits.* says 4",
    ),
    "fp8 by tensor where blocks are said": (
        "fp8 by block",
        {},
        lambda t: t.update(weight_scale_inv=torch.tensor(0.5)),
        r"scales of the shape \[\] do not fit 200 x 320 numbers in blocks",
    ),
    "fp8 by channel where blocks are said": (
        "fp8 by channel",
        {
            "config_groups": {
                "group_0": {
                    "weights": {
                        "type": "float",
                        "num_bits": 8,
                        "strategy": "block",
                        "block_structure": [128, 128],
                    }
                }
            }
        },
        lambda t: None,
        "1 groups of 160 columns.* says 8 bits, floats, groups of 128",
    ),
    "mxfp4 of an odd size": (
        "mxfp4",
        {},
        lambda t: t.update(weight_packed=torch.zeros(32, 81, dtype=torch.uint8)),
        "162 columns are no multiple of 32",
    ),
    "nothing": (
        "awq 128",
        {},
        lambda t: t.update(qweight=t["qweight"][:, :0]),
        r"qweight has the shape \[256, 0\]: there are no numbers",
    ),
    "fp8 of NaN": (
        "fp8 by block",
        {},
        lambda t: t["weight_scale_inv"].fill_(float("inf")),
        "NaN or infinite",
    ),
    "fp4 without a factor": ("nvfp4", {}, _zero("weight_global_scale"), "all zero"),
    "mxfp4 of NaN": ("mxfp4", {}, lambda t: t["weight_scale"].fill_(255), "scales that are NaN"),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_what_disagrees_with_the_config_or_means_nothing_is_refused(
    case: str, tmp_path: Path
) -> None:
    name, more, harm, message = DISAGREEING[case]
    make, config, _ = CASES[name]
    written = make(np.random.default_rng(0))
    harm(written.tensors)
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, named(written), config | more).matrix(f"{NAME}.weight")


def test_a_config_that_says_more_than_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="quantised with gptq, and no tensor is"):
        opened(tmp_path, {f"{NAME}.weight": torch.ones(4, 4)}, {"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' .* gemm"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' .* gptq_v2"),
        ({"quant_method": CT, "transform_config": {"a": 1}}, "transform_config .* not rotated"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not known"),
        ({"quant_method": "FP8"}, "'FP8' is not known.* the nearest is fp8"),
        ({"quant_method": "awq_marlin"}, "the nearest is awq"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'.* NVFP4"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
        ([], r"must be an object, not \[\]"),
    ],
)
def test_configs_that_cannot_be_read_say_what_is_known(config: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_quantization({"quantization_config": config}, None)


@pytest.mark.parametrize(
    ("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_what_the_first_tools_wrote_beside_the_config_is_read(
    file: str, method: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text('{"bits": 4, "q_group_size": 64}')
    found = read_quantization({}, tmp_path)
    assert found is not None
    assert (found.method, found.schemes.of(NAME)[0].group) == (method, 64)


@pytest.mark.parametrize(
    ("asked", "words"),
    [("awq", "quantised with gptq"), ("squeezellm", "quantised with gptq"), ("gptq_marlin", "")],
)
def test_the_option_must_name_what_the_checkpoint_is(asked: str, words: str) -> None:
    found = read_quantization({"quantization_config": {"quant_method": "gptq"}}, None)
    if not words:
        check_quantization(asked, found)
        return
    with pytest.raises(ConfigError, match=words):
        check_quantization(asked, found)
    with pytest.raises(ConfigError, match="can be made fp8, int8, int4"):
        check_quantization(asked, None)


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, None),
        ({"kv_cache_scheme": None}, None),
        ({"kv_cache_scheme": SCHEME}, "fp8"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, "fp8"),
        ({"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}}, "fp8"),
        ({"kv_cache_scheme": SCHEME | {"dynamic": True}}, None),
        ({"kv_cache_scheme": SCHEME | {"type": "int"}}, "int 8 tensor"),
        ({"kv_cache_scheme": SCHEME | {"symmetric": False}}, "float 8 tensor"),
        ({"kv_cache_scheme": SCHEME | {"strategy": "channel"}}, "float 8 channel"),
        ({"kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
    ],
)
def test_scales_of_keys_and_values_are_for_the_format_that_the_config_names(
    fields: dict[str, Any], stored: str | None
) -> None:
    config = {"quant_method": "compressed-tensors"} | fields
    found = read_quantization({"quantization_config": config}, None)
    assert found is not None
    assert found.kv_cache == stored
    for formats in ("auto", "int8", "int4", "bfloat16", "fp8/int8"):
        check_kv_cache(formats, found)
    if stored in (None, "fp8"):
        check_kv_cache("fp8", found)
        return
    with pytest.raises(ConfigError, match=f"kv_cache_dtype 'fp8'.* are for {stored}.*use int8"):
        check_kv_cache("fp8", found)


def test_a_scheme_of_the_kv_cache_that_is_none_is_refused() -> None:
    config = {"quant_method": "compressed-tensors", "kv_cache_scheme": "fp8"}
    with pytest.raises(UnsupportedModelError, match="kv_cache_scheme 'fp8' cannot be read"):
        read_quantization({"quantization_config": config}, None)
