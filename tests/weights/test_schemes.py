"""Bits and groups that differ by module: what the config says of each, and no other, is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.kernels.dequantize import dequantize_rows
from octavo.weights.quantization import read_quantization
from octavo.weights.schemes import WHOLE_ROW, Scheme
from tests.weights.packing import Written, compressed, gptq
from tests.weights.published_cases import CT, NAME, named, opened

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
FULL = "model.language_model.layers.0.self_attn.o_proj"
"""As models that also see call it."""


def check(folder: Path, written: Written, config: dict[str, Any], name: str = NAME) -> None:
    source = opened(folder, named(written, name), config)
    weight = source.matrix(f"{NAME}.weight")
    assert torch.equal(dequantize_rows(weight, slice(None)), written.values)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({**GPTQ, "dynamic": {r"+:.*\.o_proj": {"bits": 8, "group_size": 64}}}, NAME),
        (
            {
                **GPTQ,
                "dynamic": {r".*\.q_proj": {}, r"model\.layers": {"bits": 8, "group_size": 64}},
            },
            NAME,
        ),
        ({**GPTQ, "dynamic": {r"model\.language_model\.": {"bits": 8, "group_size": 64}}}, FULL),
        ({**AUTO_ROUND, "extra_config": {NAME: {"bits": 8, "group_size": 64}}}, NAME),
        ({**AUTO_ROUND, "extra_config": {FULL: {"bits": 8, "group_size": 64}}}, FULL),
        ({**AUTO_ROUND, "extra_config": {r"attn\.o_": {"bits": 8, "group_size": 64}}}, NAME),
        (
            {
                **AUTO_ROUND,
                "extra_config": {r".*o_proj": {"bits": 2}, NAME: {"bits": 8, "group_size": 64}},
            },
            NAME,
        ),
    ],
    ids=["pattern", "start", "prefixed", "name", "prefixed name", "anywhere", "names first"],
)  # fmt: skip
def test_a_module_has_the_bits_and_groups_that_the_config_says_of_it(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    check(tmp_path, gptq(np.random.default_rng(0), 32, 256, 64, 8, less_one=True), config, name)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPTQ, "says 4 bits, integers, groups of 128"),
        ({**GPTQ, "dynamic": {r".*q_proj": {"bits": 8, "group_size": 64}}}, "says 4 bits"),
        ({**GPTQ, "dynamic": {r"o_proj": {"bits": 8, "group_size": 64}}}, "says 4 bits"),
        ({**GPTQ, "dynamic": {r"-:.*o_proj": {}}}, "says no codes at all"),
        ({**AUTO_ROUND, "extra_config": {NAME: {"bits": 16}}}, "says no codes at all"),
        ({**GPTQ, "bits": 8, "group_size": -1}, "in 4 groups of 64 .* says 8 bits.* whole rows"),
    ],
)
def test_codes_that_the_config_does_not_say_of_a_module_are_refused(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    written = gptq(np.random.default_rng(0), 32, 256, 64, 8, less_one=True)
    with pytest.raises(WeightsError, match=f"o_proj: codes of 8 bits.* {words}"):
        opened(tmp_path, named(written), config)


def test_a_last_group_that_is_smaller_is_as_wide_as_the_config_says(tmp_path: Path) -> None:
    """192 columns in two groups are 96 and 96, or 128 and 64: the tensors do not show it."""
    written = gptq(np.random.default_rng(0), 32, 192, 128, 4, less_one=True)
    wide = {"bits": 4, "group_size": 128}
    check(tmp_path, written, {**GPTQ, "group_size": 64, "dynamic": {r".*\.o_proj": wide}})
    source = opened(tmp_path, named(written), GPTQ)
    source.check_packed()
    assert source.format(f"{NAME}.weight").name == "int4_128_f16"


def test_groups_that_do_not_show_are_refused_where_the_config_is_silent(tmp_path: Path) -> None:
    written = gptq(np.random.default_rng(0), 32, 224, 64, 4, less_one=True)
    with pytest.raises(WeightsError, match="4 groups of 224 columns: how wide"):
        opened(tmp_path, named(written), {"quant_method": "gptq", "bits": 4})


def groups_of(*weights: dict[str, Any]) -> dict[str, Any]:
    each = {f"group_{n}": {"targets": ["Linear"], "weights": one} for n, one in enumerate(weights)}
    return {"quant_method": CT, "config_groups": each}


FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def test_a_mixture_of_schemes_is_read_and_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    args = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    written = compressed(np.random.default_rng(0), 33, 160, "pack-quantized", **args)
    check(tmp_path, written, groups_of(FOUR, args))
    seven = {**args, "num_bits": 7}  # which older writers gave eight bits of room
    for schemes in ((FOUR, seven), (FOUR, {**args, "type": "float"}), (FOUR,)):
        with pytest.raises(WeightsError, match=r"codes of 8 bits.* says 4 bits"):
            opened(tmp_path, named(written), groups_of(*schemes))


EIGHT = {"num_bits": 8, "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("targets", "ignored", "words"),
    [
        ((["re:.*mlp", "Linear"], ["re:.*self_attn", "re:z"]), [], None),
        ((["Linear"], [NAME]), [], None),
        ((["re:.*o_proj"], [FULL]), [], None),
        ((["re:b", "re:.*o_proj"], ["re:.*attn"]), [], None),
        ((["re:.*attn"], ["re:.*o_proj", "Linear"]), [], "says 4 bits"),
        (([NAME], ["re:.*"]), [], "says 4 bits"),
        ((["re:o_proj"], ["re:o_proj"]), [], None),
        ((["Linear"], ["Linear"]), ["re:.*o_proj"], "says no codes at all"),
        ((["Linear"], ["Linear"]), [NAME], "says no codes at all"),
    ],
)
def test_a_module_has_the_scheme_of_the_group_that_names_it(
    targets: tuple[list[str], list[str]], ignored: list[str], words: str | None, tmp_path: Path
) -> None:
    written = compressed(np.random.default_rng(0), 33, 160, "pack-quantized", **EIGHT)
    pairs = zip(targets, (FOUR, EIGHT), strict=True)
    groups = {f"group_{n}": {"targets": t, "weights": w} for n, (t, w) in enumerate(pairs)}
    config = {"quant_method": CT, "config_groups": groups, "ignore": ignored}
    name = FULL if FULL in targets[1] else NAME
    if words is None:
        check(tmp_path, written, config, name)
        return
    with pytest.raises(WeightsError, match=f"o_proj: codes of 8 bits.* {words}"):
        opened(tmp_path, named(written), config)


def test_zeros_that_the_config_says_are_there_must_be(tmp_path: Path) -> None:
    scheme = {**FOUR, "symmetric": False}
    written = compressed(np.random.default_rng(0), 40, 256, "pack-quantized", **scheme)
    check(tmp_path, written, groups_of(scheme))
    del written.tensors["weight_zero_point"]
    with pytest.raises(WeightsError, match=r"codes of 4 bits, integers in 8 .* says .*, zeros"):
        opened(tmp_path, named(written), groups_of(scheme))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**GPTQ, "dynamic": {"+:(": {}}}, r"'\(', which is to find modules, is no pattern"),
        ({**GPTQ, "dynamic": ["a"]}, r"dynamic must be an object of objects, not \['a'\]"),
        ({**GPTQ, "dynamic": {"a": 3}}, "dynamic must be an object of objects"),
        ({**AUTO_ROUND, "extra_config": {"a": {"bits": "8"}}}, "bits '8' of some modules is no"),
        ({**GPTQ, "group_size": 0}, "group_size 0 cannot be read"),
    ],
)
def test_schemes_that_cannot_be_read_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_quantization({"quantization_config": fields}, None)


def test_whole_rows_are_said_apart_from_nothing() -> None:
    for fields, group in (({"group_size": -1}, WHOLE_ROW), ({}, None)):
        found = read_quantization({"quantization_config": {"quant_method": "awq", **fields}}, None)
        assert found is not None
        assert found.schemes.of(NAME) == (Scheme(kind="int", bits=4, group=group),)


@pytest.mark.parametrize(
    "fields",
    [{"quant_method": CT, "config_groups": {}}, {"quant_method": "modelopt", "quant_algo": None}],
)
def test_a_checkpoint_that_quantises_no_weight_is_plain(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    weight = torch.randn(8, 32)
    source = opened(tmp_path, {f"{NAME}.weight": weight}, fields)
    assert torch.equal(source.matrix(f"{NAME}.weight").data, weight)
