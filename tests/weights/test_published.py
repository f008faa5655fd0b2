"""Published formats mean what the libraries say that define them, and stay packed in memory."""

from __future__ import annotations

import contextlib
import json
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
from octavo.formats import int4_format, int8_format
from octavo.kernels.dequantize import dequantize_rows, in_order
from octavo.kernels.planes import values_of
from octavo.kernels.weights import Weight
from octavo.planes import plane_layout
from octavo.weights import laid_out as laid_out_module
from octavo.weights import staging as staging_module
from octavo.weights.cast import CastSource
from octavo.weights.names import expert_names
from octavo.weights.placement import DevicePlacement, HostPlacement
from octavo.weights.quantization import read_quantization
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import TensorSource
from octavo.weights.split import Split
from tests.weights.packing import Written, awq, fp8, gptq
from tests.weights.published_cases import CASES, NAME, Make, named, opened

UNPACKED: dict[str, tuple[Make, dict[str, Any], str]] = {
    "gptq of uneven groups": (
        lambda r: gptq(r, 32, 128, 32, 4, less_one=True, reordered=True, uneven=True),
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
    cast = CastSource(source, "bfloat16").matrix(f"{NAME}.weight")
    assert torch.equal(cast.data, written.values.bfloat16())


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, 4096])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_take_at_most_a_twentieth_more_than_they_are_published_with(
    bits: int, group: int, has_zeros: bool
) -> None:
    cols, width = 4096, min(group, 128)
    form = int4_format(width, "bf16") if bits == 4 else int8_format(width)
    layout = plane_layout(form.name)
    assert layout is not None
    of_groups = cols // group * (16 + bits * has_zeros)  # scales of 16 bits
    published = (cols * bits + of_groups) / 8
    most = 1.09 if group == 32 and (bits == 8 or not has_zeros) else 1.05
    assert form.row_bytes(cols) <= most * published
    assert layout.row_bytes(cols) <= most * published


def placed_values(source: TensorSource, name: str) -> Tensor:
    """Returns what a matrix means after a device has laid it out in planes."""
    placement = DevicePlacement(source, torch.device("cpu"))
    (weight,) = placement.matrices({name: None})
    placement.finish()
    return _values(weight)


def _values(weight: Weight) -> Tensor:
    assert weight.planes is not None
    assert weight.layout is not None
    values = values_of(weight.layout, weight.planes, weight.cols)
    return values if weight.order is None else in_order(values, weight.order)


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


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_cut_every_format_on_the_borders_of_its_groups(case: str, tmp_path: Path) -> None:
    make, config, _ = CASES[case]
    written = make(np.random.default_rng(len(case)))
    source, name = opened(tmp_path, named(written), config), f"{NAME}.weight"
    whole = placed_values(source, name)
    count, width = whole.shape
    by_axis = {
        "rows": Split(axis="rows", unit="rows", num_units=count),
        "cols": Split(axis="cols", unit="columns", num_units=width),
    }
    for axis, split in by_axis.items():
        layout = source.layout(name)
        assert layout is not None
        fits = count % 2 == 0 if axis == "rows" else width % (2 * layout.step) == 0
        fits &= axis == "rows" or source.order(name) is None
        if not fits:
            with pytest.raises(ConfigError, match=r"use 1( or \d+)*(, or --dtype bfloat16)?$"):
                _part(source, name, split, 1)
            continue
        parts = [_part(source, name, split, rank) for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim=list(by_axis).index(axis)), whole)


def _part(source: TensorSource, name: str, split: Split, rank: int) -> Tensor:
    placement = DevicePlacement(source, torch.device("cpu"), rank, 2)
    (weight,) = placement.matrices({name: split})
    placement.finish()
    return _values(weight)


@pytest.mark.parametrize("case", UNPACKED)
def test_what_blocks_cannot_say_is_refused_unless_it_is_unpacked(case: str, tmp_path: Path) -> None:
    make, config, why = UNPACKED[case]
    written = make(np.random.default_rng(1))
    source = opened(tmp_path, named(written), config)
    with pytest.raises(UnsupportedModelError, match=rf"{why}.* --dtype bfloat16"):
        source.check_packed()
    cast = CastSource(source, "float32").matrix(f"{NAME}.weight")
    assert torch.equal(cast.data, written.values)


@pytest.mark.parametrize("shape", [(200, 320), (130, 256)])
def test_nvidias_blocks_of_fp8_have_scales_of_four_dimensions(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    written = fp8(np.random.default_rng(3), *shape, (128, 128), torch.float32)
    scales = written.tensors["weight_scale_inv"]
    tensors = {"weight": written.tensors["weight"], "weight_scale": scales[:, None, :, None]}
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    source = opened(tmp_path, named(Written(tensors, written.values)), config)
    source.check_packed()
    weight = source.matrix(f"{NAME}.weight")
    assert torch.equal(dequantize_rows(weight, slice(None)), written.values)
    assert torch.equal(placed_values(source, f"{NAME}.weight"), written.values)
    tensors["weight_scale"] = scales[:, :, None, None]
    with pytest.raises(WeightsError, match=r"scales of the shape \[\d, \d, 1, 1\] do not fit"):
        opened(tmp_path, named(Written(tensors, written.values)), config)


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


def test_columns_out_of_order_are_refused_on_a_host(tmp_path: Path) -> None:
    make, config, _ = CASES["gptq 4 bits out of order"]
    source = opened(tmp_path, named(make(np.random.default_rng(0))), config)
    with pytest.raises(UnsupportedModelError, match=r"out of order \(desc_act\), which cpu"):
        HostPlacement(source).matrices({f"{NAME}.weight": None})
