"""Safetensors checkpoints, whole and broken."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.errors import OctavoError, UnsupportedModelError, WeightsError
from octavo.weights.checkpoint import INDEX_FILE
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.staging import Staging
from tests.models.tiny import save_tiny
from tests.weights.reading import anonymous_bytes, read

FAMILIES = ("llama", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "glm4-moe")


@pytest.mark.parametrize("case", FAMILIES)
def test_every_tensor_of_a_saved_model_is_read(case: str, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, tiny.config["model_type"])
    assert source.names() == expected.keys()
    assert source.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(read(source, name), tensor)


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "olmoe", "glm4-moe"])
def test_experts_saved_stacked_are_read_one_by_one_under_their_usual_names(
    case: str, tmp_path: Path
):
    tiny = save_tiny(case, tmp_path / "usual")
    tiny.reference.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any("gate_up_proj" in n for n in load_file(tmp_path / "stacked/model.safetensors"))
    usual = open_safetensors(tmp_path / "usual", tiny.config["model_type"])
    tensors = load_file(tmp_path / "stacked" / "model.safetensors")
    for is_turned in (False, True):  # as trainers save the stacks of any family
        if is_turned:
            tensors |= {n: t.mT.contiguous() for n, t in tensors.items() if t.ndim == 3}
        save_file(tensors, tmp_path / "stacked" / "model.safetensors")
        stacked = open_safetensors(tmp_path / "stacked", tiny.config["model_type"])
        assert stacked.names() == usual.names()
        assert stacked.nbytes == usual.nbytes
        for name in usual.names():
            assert torch.equal(read(stacked, name), read(usual, name)), name


def test_shards_are_read_as_the_index_says(tmp_path: Path):
    tiny = save_tiny("mixtral", tmp_path / "one")
    tiny.reference.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    save_file({"stray": torch.zeros(1)}, tmp_path / "many" / "stray.safetensors")
    one = open_safetensors(tmp_path / "one", "mixtral")
    many = open_safetensors(tmp_path / "many", "mixtral")
    assert many.names() == one.names()
    assert all(torch.equal(read(many, name), read(one, name)) for name in one.names())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matrices_keep_their_number_format_and_vectors_become_float32(
    dtype: torch.dtype, tmp_path: Path
):
    tensors = {"m": torch.randn(5, 7).to(dtype), "v": torch.randn(7).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, "llama")
    assert torch.equal(source.matrix("m").data, tensors["m"])
    assert source.vector("v").dtype == torch.float32
    assert torch.equal(source.vector("v"), tensors["v"].float())


def test_reading_makes_no_second_copy_in_memory(tmp_path: Path):
    size = 64 * 2**20
    save_file({"m": torch.zeros(1024, size // 1024, dtype=torch.uint8).view(torch.float32)},
              tmp_path / "model.safetensors")  # fmt: skip
    before = anonymous_bytes()
    source = open_safetensors(tmp_path, "llama")
    matrix = source.matrix("m").data
    assert matrix.sum() == 0
    assert anonymous_bytes() - before < size // 8
    assert source.matrix("m").data.data_ptr() == matrix.data_ptr()


def test_a_released_tensor_can_be_read_again(tmp_path: Path):
    expected = torch.randn(300, 400)
    save_file({"m": expected}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, "llama")
    view = source.matrix("m").data
    source.release("m")
    assert torch.equal(view, expected)


def test_a_header_of_odd_length_is_read(tmp_path: Path):
    header = json.dumps({"m": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    numbers = torch.tensor([[1.0, 2.0]])
    content = len(header).to_bytes(8, "little") + header + numbers.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert torch.equal(open_safetensors(tmp_path, "llama").matrix("m").data, numbers)


def test_a_truncated_file_names_the_file_and_the_tensor(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.zeros(4), "last": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated: last ends at byte"):
        open_safetensors(tmp_path, "llama")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, b"\x04\0\0\0\0\0\0\0{]  "])
def test_a_file_that_is_no_safetensors_is_refused_by_name(content: bytes, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_safetensors(tmp_path, "llama")


def test_a_shape_that_does_not_fit_the_bytes_names_the_tensor(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"odd": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes().replace(b"[4,4]", b"[4,5]"))
    with pytest.raises(WeightsError, match=r"odd of shape \[4, 5\] in F32 cannot have 64 bytes"):
        open_safetensors(tmp_path, "llama")


def test_a_missing_shard_is_named(tmp_path: Path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 of 2 .*model-2\.safetensors"):
        open_safetensors(tmp_path, "llama")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(text: str, tmp_path: Path):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match="is no index of weights"):
        open_safetensors(tmp_path, "llama")


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path):
    for number in (1, 2):
        save_file({"twice": torch.zeros(1)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(WeightsError, match=r"twice is both in 1\.safetensors and in 2"):
        open_safetensors(tmp_path, "llama")


def test_a_number_format_that_is_not_known_is_refused_when_it_is_read(tmp_path: Path):
    save_file({"m": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"m in .* has the number format I8; known"):
        open_safetensors(tmp_path, "llama").matrix("m")


def test_a_missing_name_and_a_wrong_rank_are_refused(tmp_path: Path):
    save_file({"v": torch.zeros(2)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, "llama")
    with pytest.raises(WeightsError, match="tensor w is missing"):
        source.shape("w")
    with pytest.raises(WeightsError, match=r"v is no matrix: its shape is \[2\]"):
        source.matrix("v")


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_the_header_never_raises_anything_unexpected(seed: int, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"m": torch.zeros(4, 4), "v": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    for _ in range(3):
        content[rng.randrange(120)] = rng.randrange(256)
    path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
    with contextlib.suppress(OctavoError):
        source = open_safetensors(tmp_path, "llama")
        for name in source.names():
            read(source, name)


def test_transposed_stacks_of_experts_are_read_one_by_one(tmp_path: Path):
    tiny = save_tiny("llama4", tmp_path)
    source = open_safetensors(tmp_path, "llama4_text")
    stacks = tiny.reference.state_dict()
    both = stacks["model.layers.1.feed_forward.experts.gate_up_proj"]
    down = stacks["model.layers.1.feed_forward.experts.down_proj"]
    names = "model.layers.1.feed_forward.experts"
    for expert in range(4):
        gate, up = both[expert].T.chunk(2)
        assert torch.equal(read(source, f"{names}.{expert}.gate_proj.weight"), gate)
        assert torch.equal(read(source, f"{names}.{expert}.up_proj.weight"), up)
        assert torch.equal(read(source, f"{names}.{expert}.down_proj.weight"), down[expert].T)


def test_alternating_stacks_of_experts_and_their_biases_are_read_one_by_one(tmp_path: Path):
    tiny = save_tiny("gpt-oss-odd", tmp_path)
    source = open_safetensors(tmp_path, "gpt_oss")
    stacks = tiny.reference.state_dict()
    names = "model.layers.2.mlp.experts"
    for expert in range(3):
        one = f"{names}.{expert}"
        both, bias = (stacks[f"{names}.gate_up_proj{end}"][expert] for end in ("", "_bias"))
        down, down_bias = (stacks[f"{names}.down_proj{end}"][expert] for end in ("", "_bias"))
        assert torch.equal(read(source, f"{one}.gate_proj.weight"), both[:, 0::2].T)
        assert torch.equal(read(source, f"{one}.up_proj.weight"), both[:, 1::2].T)
        assert torch.equal(read(source, f"{one}.gate_proj.bias"), bias[0::2])
        assert torch.equal(read(source, f"{one}.up_proj.bias"), bias[1::2])
        assert torch.equal(read(source, f"{one}.down_proj.weight"), down.T)
        assert torch.equal(read(source, f"{one}.down_proj.bias"), down_bias)
        part, staging = torch.empty(5, 7), Staging(torch.device("cpu"))
        source.copy_into(f"{one}.up_proj.weight", part, staging, 3, 2)
        assert torch.equal(part, both[2:9, 1::2].T[3:8])
