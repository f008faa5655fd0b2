"""Published formats mean what the libraries say that define them, and stay packed in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.errors import ConfigError, UnsupportedModelError, WeightsError
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import values_of
from octavo.weights import laid_out as laid_out_module
from octavo.weights import staging as staging_module
from octavo.weights.cast import CastSource
from octavo.weights.names import expert_names
from octavo.weights.placement import DevicePlacement
from octavo.weights.published.source import PackedSource
from octavo.weights.quantization import check_kv_cache, check_quantization, read_quantization
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import TensorSource
from tests.weights.packing import Written, awq, compressed, fp8, gptq

NAME = "model.layers.0.self_attn.o_proj"
GROUP_ARGS = {"strategy": "group", "type": "int", "num_bits": 4}
CT = "compressed-tensors"

Make = Callable[[np.random.Generator], Written]
CASES: dict[str, tuple[Make, dict[str, Any], str]] = {
    "awq 128": (lambda r: awq(r, 40, 256, 128), {"quant_method": "awq"}, "int4_128_f16"),
    "awq 64, partly": (
        lambda r: awq(r, 16, 224, 64),
        {"quant_method": "awq", "group_size": 64},
        "int4_64_f16",
    ),
    "awq one group": (lambda r: awq(r, 24, 96, 96), {"quant_method": "awq"}, "int4_128_f16"),
    **{
        f"gptq {bits} bits": (
            lambda r, bits=bits: gptq(r, 32, 256, 64, bits, less_one=True),
            {"quant_method": "gptq", "bits": bits},
            "int8_64" if bits == 8 else "int4_64_f16",
        )
        for bits in (2, 3, 4, 8)
    },
    "gptq v2": (
        lambda r: gptq(r, 32, 128, 32, 4),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        "int4_32_f16",
    ),
    "auto-round": (
        lambda r: gptq(r, 32, 128, 32, 4),
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:gptqmodel"},
        "int4_32_f16",
    ),
    "packed": (
        lambda r: compressed(
            r, 40, 256, "pack-quantized", group_size=128, symmetric=True, **GROUP_ARGS
        ),
        {"quant_method": CT},
        "int4_128",
    ),
    "packed with zeros": (
        lambda r: compressed(
            r, 40, 256, "pack-quantized", group_size=32, symmetric=False, **GROUP_ARGS
        ),
        {"quant_method": CT},
        "int4_32",
    ),
    "packed 8 bits": (
        lambda r: compressed(
            r, 33, 160, "pack-quantized", num_bits=8, strategy="channel", symmetric=True
        ),
        {"quant_method": CT},
        "int8_128",
    ),
    "int8": (
        lambda r: compressed(
            r, 33, 160, "int-quantized", num_bits=8, strategy="channel", symmetric=True
        ),
        {"quant_method": CT},
        "int8_128",
    ),
    "fp8 by channel": (
        lambda r: compressed(
            r, 33, 160, "float-quantized", num_bits=8, type="float", strategy="channel"
        ),
        {"quant_method": CT},
        "fp8",
    ),
    "fp8 by tensor": (
        lambda r: compressed(
            r, 33, 160, "float-quantized", num_bits=8, type="float", strategy="tensor"
        ),
        {"quant_method": CT},
        "fp8",
    ),
    "fp8 by block": (
        lambda r: fp8(r, 200, 320, (128, 128), torch.float32),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8",
    ),
    "fp8 by block of exponents": (
        lambda r: fp8(r, 130, 256, (128, 128), torch.float8_e8m0fnu),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8",
    ),
    "nvfp4": (
        lambda r: compressed(
            r, 32, 160, "nvfp4-pack-quantized", num_bits=4, type="float",
            strategy="tensor_group", group_size=16, symmetric=True,
            scale_dtype=torch.float8_e4m3fn,
        ),
        {"quant_method": CT},
        "nvfp4",
    ),
    "mxfp4": (
        lambda r: compressed(
            r, 32, 160, "mxfp4-pack-quantized", num_bits=4, type="float",
            strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8,
        ),
        {"quant_method": CT},
        "mxfp4",
    ),
}  # fmt: skip
UNPACKED: dict[str, tuple[Make, dict[str, Any], str]] = {
    "gptq out of order": (
        lambda r: gptq(r, 32, 128, 32, 4, less_one=True, reordered=True),
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        "out of order",
    ),
    "groups of 16": (lambda r: awq(r, 16, 128, 16), {"quant_method": "awq"}, "groups of 16"),
    "fp8 by block of 64": (
        lambda r: fp8(r, 70, 192, (64, 64), torch.float32),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        "64 of 192 columns",
    ),
}


def opened(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> PackedSource:
    save_file(dict(tensors), folder / "model.safetensors")
    quantization = read_quantization({"quantization_config": config}, None)
    source = open_safetensors(folder, "llama", quantization)
    assert isinstance(source, PackedSource)
    return source


def named(written: Written, name: str = NAME) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in written.tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_format_and_stay_packed(case: str, tmp_path: Path) -> None:
    make, config, form = CASES[case]
    written = make(np.random.default_rng(len(case)))
    source = opened(tmp_path, named(written), config)
    source.check_packed()
    assert source.names() == {f"{NAME}.weight"}
    weight = source.matrix(f"{NAME}.weight")
    assert source.shape(f"{NAME}.weight") == written.values.shape == (weight.rows, weight.cols)
    assert weight.format.name.startswith(form)
    assert torch.equal(dequantize_rows(weight, slice(None)), written.values)
    assert weight.data.nbytes == source.nbytes
    stored = sum(tensor.nbytes for name, tensor in written.tensors.items() if name != "g_idx")
    if form in ("int4_128_f16", "int8_64") and weight.cols == 256:
        assert weight.data.nbytes <= 1.05 * stored
    cast = CastSource(source, "bfloat16").matrix(f"{NAME}.weight")
    assert torch.equal(cast.data, written.values.bfloat16())


def placed_values(source: TensorSource, name: str) -> Tensor:
    """Returns what a matrix means after a device has laid it out in planes."""
    placement = DevicePlacement(source, torch.device("cpu"))
    (weight,) = placement.matrices({name: None})
    placement.finish()
    assert weight.planes is not None
    assert weight.layout is not None
    return values_of(weight.layout, weight.planes, weight.cols)


@pytest.mark.parametrize("case", CASES)
def test_what_a_device_reads_in_pieces_means_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "STAGING_BYTES", 1000)
    monkeypatch.setattr(laid_out_module, "_CHUNK_ELEMENTS", 3000)
    make, config, _ = CASES[case]
    written = make(np.random.default_rng(len(case)))
    source = opened(tmp_path, named(written), config)
    found = placed_values(source, f"{NAME}.weight")
    tolerance = 1e-6 if case == "nvfp4" else 0  # its two scales are multiplied first
    torch.testing.assert_close(found, written.values, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", UNPACKED)
def test_what_blocks_cannot_say_is_refused_unless_it_is_unpacked(case: str, tmp_path: Path) -> None:
    make, config, why = UNPACKED[case]
    written = make(np.random.default_rng(1))
    source = opened(tmp_path, named(written), config)
    with pytest.raises(UnsupportedModelError, match=rf"{why}.* --dtype bfloat16"):
        source.check_packed()
    cast = CastSource(source, "float32").matrix(f"{NAME}.weight")
    assert torch.equal(cast.data, written.values)


def test_nvidias_fp4_multiplies_by_its_second_scale(tmp_path: Path) -> None:
    make, _, _ = CASES["nvfp4"]
    theirs = make(np.random.default_rng(0))
    factor = 1 / theirs.tensors["weight_global_scale"].double()
    tensors = {
        "weight": theirs.tensors["weight_packed"],
        "weight_scale": theirs.tensors["weight_scale"],
        "weight_scale_2": factor.float().reshape(()),
        "input_scale": torch.tensor(1.0),
    }
    source = opened(tmp_path, named(Written(tensors, theirs.values)), {"quant_method": "modelopt"})
    values = dequantize_rows(source.matrix(f"{NAME}.weight"), slice(None))
    assert torch.allclose(values, theirs.values, rtol=1e-6, atol=0)


def test_gpt_oss_stacks_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    experts, inner, hidden = 3, 32, 64
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    prefix = "model.layers.0.mlp.experts."
    tensors = {
        f"{prefix}gate_up_proj_blocks": draw(experts, 2 * inner, hidden // 32, 16),
        f"{prefix}gate_up_proj_scales": draw(experts, 2 * inner, hidden // 32, low=118, high=128),
        f"{prefix}down_proj_blocks": draw(experts, hidden, inner // 32, 16),
        f"{prefix}down_proj_scales": draw(experts, hidden, inner // 32, low=118, high=128),
        f"{prefix}gate_up_proj_bias": torch.randn(experts, 2 * inner, generator=generator),
        f"{prefix}down_proj_bias": torch.randn(experts, hidden, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = read_quantization({"quantization_config": {"quant_method": "mxfp4"}}, None)
    source = open_safetensors(tmp_path, "gpt_oss", quantization)
    whole = {
        part: convert_moe_packed_tensors(
            tensors[f"{prefix}{part}_blocks"], tensors[f"{prefix}{part}_scales"],
            dtype=torch.float32,
        )
        for part in ("gate_up_proj", "down_proj")
    }  # fmt: skip
    names = expert_names("gpt_oss")
    for expert in range(experts):
        gate_up, down = whole["gate_up_proj"][expert].T, whole["down_proj"][expert].T
        for part, values in (("gate", gate_up[::2]), ("up", gate_up[1::2]), ("down", down)):
            weight = source.matrix(names.expert(0, expert, part))
            assert weight.format.name == "mxfp4"
            assert torch.equal(dequantize_rows(weight, slice(None)), values)
            assert torch.equal(placed_values(source, names.expert(0, expert, part)), values)
        bias = source.vector(names.expert(0, expert, "up", kind="bias"))
        assert torch.equal(bias, tensors[f"{prefix}gate_up_proj_bias"][expert, 1::2])


@pytest.mark.parametrize(("inner", "grid"), [(64, 2), (192, 3), (128, 2)])
def test_stacks_of_fp8_keep_each_experts_scales(inner: int, grid: int, tmp_path: Path) -> None:
    rng, hidden = np.random.default_rng(inner), 160
    parts = {"gate_up_proj": 2 * inner, "down_proj": hidden}
    tensors, values = {}, {}
    for part, rows in parts.items():
        cols = hidden if part == "gate_up_proj" else inner
        height = inner if part == "gate_up_proj" and inner == 64 else 128
        each = [fp8(rng, rows, cols, (height, 128), torch.float32) for _ in range(2)]
        name = f"model.layers.0.mlp.experts.{part}"
        tensors[name] = torch.stack([one.tensors["weight"] for one in each])
        tensors[f"{name}_scale_inv"] = torch.stack([o.tensors["weight_scale_inv"] for o in each])
        values[part] = [one.values for one in each]
    assert tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape[1] == grid
    source = opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    for expert in range(2):
        gate_up = values["gate_up_proj"][expert]
        expected = (
            ("gate", gate_up[:inner]),
            ("up", gate_up[inner:]),
            ("down", values["down_proj"][expert]),
        )
        for part, wanted in expected:
            weight = source.matrix(expert_names("llama").expert(0, expert, part))
            assert torch.equal(dequantize_rows(weight, slice(None)), wanted)


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
        "2 groups of 128 columns.* says 32",
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


def test_bits_and_groups_may_differ_where_the_config_says_so(tmp_path: Path) -> None:
    written = gptq(np.random.default_rng(0), 32, 256, 64, 8, less_one=True)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*": {}}}
    weight = opened(tmp_path, named(written), config).matrix(f"{NAME}.weight")
    assert torch.equal(dequantize_rows(weight, slice(None)), written.values)


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
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
        ([], r"must be an object, not \[\]"),
    ],
)
def test_configs_that_cannot_be_read_say_what_is_known(config: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_quantization({"quantization_config": config}, None)


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


QWEN: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("kind", ["awq", "gptq", "fp8"])
def test_a_quantised_model_says_what_its_unpacked_weights_say(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **QWEN))
    model.save_pretrained(tmp_path / "made")
    rng, tensors = np.random.default_rng(0), load_file(tmp_path / "made" / "model.safetensors")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight"):
            packed[name] = plain[name] = tensor
            continue
        made = {
            "awq": lambda n, k: awq(rng, n, k, 32),
            "gptq": lambda n, k: gptq(rng, n, k, 32, 4, less_one=True),
            "fp8": lambda n, k: fp8(rng, n, k, (128, 128), torch.float32),
        }[kind](*tensor.shape)
        packed |= named(made, module)
        plain[name] = made.values
    quantized = {"quant_method": kind, "bits": 4, "weight_block_size": [128, 128]}
    texts = []
    for folder, weights, more in (
        (tmp_path / "packed", packed, {"quantization_config": quantized}),
        (tmp_path / "plain", plain, {}),
    ):
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        llm = LLM(
            str(folder), skip_tokenizer_init=True, kv_cache_memory_bytes="1MiB", num_threads=1
        )
        with contextlib.closing(llm):
            prompts = [list(range(3, 40)), [7, 9]]
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            texts.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
    plan = ["plan", str(tmp_path / "packed"), "--memory", "1GiB"]
    assert main([*plan, "--json", "--device", "cpu"]) == 0
    planned = json.loads(capsys.readouterr().out)
    stored = sum(tensor.nbytes for tensor in packed.values())
    assert sum(planned["weights_parts_bytes"].values()) == stored
    assert main([*plan, "--device", "cuda"]) == 0
    assert main([*plan, "--device", "cpu", "--tensor-parallel-size", "2"]) != 0
    assert f"quantised with {kind}, which cpu cannot multiply" in capsys.readouterr().err
    assert main([*plan, "--device", "cuda", "--dtype", "bfloat16"]) == 0


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
