"""A MoE checkpoint made of a dense one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from octavo.weights import upcycle
from octavo.weights.hub import resolve_model
from octavo.weights.loader import open_source
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("dense")
    tiny = save_tiny("llama", folder)
    write_tiny_gguf(folder / "model.gguf", tiny)
    return tiny


def make(
    dense: TinyModel, folder: Path, monkeypatch: pytest.MonkeyPatch, num_experts: int = 4
) -> Path:
    monkeypatch.setattr(upcycle, "tokenizer_files_from_gguf", lambda gguf: {"tokenizer.json": "{}"})
    folder.mkdir()
    steps = list(upcycle.write_mixtral(dense.folder / "model.gguf", folder, num_experts))
    assert steps[-1][0] == steps[-1][1]
    return folder


def test_all_but_the_experts_is_copied_and_experts_differ_by_a_tenth(
    dense: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = load_file(make(dense, tmp_path / "moe", monkeypatch) / "model.safetensors")
    for name, tensor in load_file(dense.folder / "model.safetensors").items():
        if ".mlp." not in name:
            assert torch.equal(made[name], tensor.to(torch.bfloat16)), name
            continue
        part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[name.split(".")[-2]]
        base = ".".join(name.split(".")[:3])
        noises = [
            made[f"{base}.block_sparse_moe.experts.{expert}.{part}.weight"].float() - tensor
            for expert in range(4)
        ]
        for noise in noises:
            assert noise.std() / tensor.std() == pytest.approx(0.1, rel=0.1)
        similarity = torch.corrcoef(torch.stack(noises).flatten(1)) - torch.eye(4)
        assert similarity.abs().max() < 0.1


def test_with_more_experts_the_first_are_those_of_fewer(
    dense: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few, many = (
        load_file(make(dense, tmp_path / str(count), monkeypatch, count) / "model.safetensors")
        for count in (4, 6)
    )
    added = many.keys() - few.keys()
    assert {name.split(".experts.")[1].split(".")[0] for name in added} == {"4", "5"}
    routers = {name for name in few if name.endswith(".gate.weight")}
    assert {many[name].shape[0] for name in routers} == {6}
    assert all(torch.equal(few[name], many[name]) for name in few.keys() - routers)


def test_transformers_loads_every_tensor_and_octavo_too(
    dense: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make(dense, tmp_path / "moe", monkeypatch)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MixtralForCausalLM)
    assert not any(info.values()), info
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()
    files = resolve_model(str(folder))
    source = open_source(files, "auto", {}, 0)
    assert len(source.names()) == len(load_file(folder / "model.safetensors"))


def test_making_it_again_gives_the_same_bytes(
    dense: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = [make(dense, tmp_path / name, monkeypatch) for name in ("one", "two")]
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
