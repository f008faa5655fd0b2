"""Weights that are quantised when they are loaded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.errors import ConfigError
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import values_of
from octavo.weights.made import LoadQuantization
from octavo.weights.placement import DevicePlacement
from octavo.weights.quantization import check_quantization
from octavo.weights.quantized import QuantizedSource
from octavo.weights.safetensors_source import open_safetensors
from tests.models.tiny import save_tiny

LIMITS: dict[LoadQuantization, float] = {"fp8": 0.03, "int8": 0.01, "int4": 0.13}
NAMES = ("model.embed_tokens.weight", "mlp.gate.weight", "mlp.up_proj.weight", "odd.weight")


def quantized(
    folder: Path, kind: LoadQuantization
) -> tuple[QuantizedSource, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 160, generator=generator).bfloat16() for name in NAMES}
    tensors["odd.weight"] = torch.randn(4, 40, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return QuantizedSource(open_safetensors(folder, "llama"), kind), tensors


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_values_are_near_and_equal_on_host_and_device(kind: LoadQuantization, tmp_path: Path):
    source, tensors = quantized(tmp_path, kind)
    name = "mlp.up_proj.weight"
    host = dequantize_rows(source.matrix(name), slice(0, 4))
    exact = tensors[name].float()
    assert (host - exact).norm() / exact.norm() < LIMITS[kind]
    placement = DevicePlacement(source, torch.device("cpu"))
    (weight,) = placement.matrices({name: None})
    placement.finish()
    assert weight.planes is not None
    assert weight.layout is not None
    assert torch.allclose(values_of(weight.layout, weight.planes, 160), host, rtol=1e-6, atol=0)


def test_embeddings_routers_and_odd_sizes_stay_numbers(tmp_path: Path):
    source, tensors = quantized(tmp_path, "int4")
    for name in ("model.embed_tokens.weight", "mlp.gate.weight", "odd.weight"):
        assert source.layout(name) is None
        assert torch.equal(source.matrix(name).data, tensors[name])
    assert source.nbytes < sum(one.nbytes for one in tensors.values())


def test_only_what_can_be_made_at_load_may_be_asked_of_plain_models():
    check_quantization("int4", None)
    with pytest.raises(ConfigError, match="can be made fp8, int8, int4 when it is loaded"):
        check_quantization("awq", None)


def test_a_checkpoint_that_quantises_the_kv_cache_alone_can_be_made_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As the plain model can, with the same tokens; the plan says the same bytes."""
    tiny = save_tiny("llama-tied-biased", tmp_path)
    config = json.loads((tiny.folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    of_kv = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    said: list[object] = []
    for fields in ({}, {"quantization_config": of_kv}):
        (tiny.folder / "config.json").write_text(json.dumps(config | fields))
        llm = LLM(
            *(str(tiny.folder),),
            **{"skip_tokenizer_init": True, "kv_cache_memory_bytes": "1MiB", "num_threads": 1},
            **{"quantization": "int8"},
        )
        with contextlib.closing(llm):
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            (out,) = llm.generate([[3, 4, 5, 6]], params)
        plan = ["plan", str(tiny.folder), "--memory", "1GiB", "--device", "cpu", "--json"]
        assert main([*plan, "--quantization", "int8"]) == 0
        sizes = json.loads(capsys.readouterr().out)["weights_parts_bytes"]
        assert main([*plan, "--tensor-parallel-size", "2"]) == 0
        capsys.readouterr()
        said.append((out.outputs[0].token_ids, sizes))
    assert said[0] == said[1]
