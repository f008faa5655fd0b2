"""GGUF files of every tensor type and MoE layout, whole and broken."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from octavo.errors import OctavoError, UnsupportedModelError, WeightsError
from octavo.formats import GGUF_FORMATS, NVFP4
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import values_of
from octavo.weights.cast import CastSource
from octavo.weights.gguf_file import TENSOR_TYPES, read_gguf
from octavo.weights.gguf_source import open_gguf
from octavo.weights.placement import DevicePlacement
from tests.kernels.cases import SCALE_OFFSETS, random_blocks
from tests.models.tiny import save_tiny
from tests.weights.reading import anonymous_bytes, read
from tests.weights.tiny_gguf import (
    add_value,
    finish,
    interleave,
    metadata_of,
    write_tiny_gguf,
    write_values,
)

CASES = [
    ("llama", "stacked"),
    ("llama-tied-biased", "stacked"),
    ("mistral", "stacked"),
    ("qwen2", "stacked"),
    ("qwen3", "stacked"),
    ("mixtral", "stacked"),
    ("mixtral", "split"),
    ("qwen2-moe", "stacked"),
    ("qwen3-moe", "stacked"),
    ("qwen3-moe", "fused"),
    ("qwen3-moe-sparse", "stacked"),
    ("olmoe", "stacked"),
    ("glm4-moe", "stacked"),
    ("glm4-moe-odd", "fused"),
]
HEADS, KV_HEADS, ROWS, COLS = 4, 2, 64, 512


@pytest.mark.parametrize(("case", "layout"), CASES)
def test_every_family_and_layout_reads_as_its_safetensors_checkpoint(
    case: str, layout: str, tmp_path: Path
):
    tiny = save_tiny(case, tmp_path)
    path = tmp_path / "model.gguf"
    expected = write_tiny_gguf(path, tiny, layout=layout)
    source = open_gguf(path)
    assert source.names() == expected.keys()
    for name, array in expected.items():
        assert source.shape(name) == array.shape, name
        assert torch.equal(read(source, name), torch.from_numpy(array)), name


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_the_tensors_equal_those_that_transformers_reads(case: str, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, tiny)
    model = AutoModelForCausalLM.from_config(tiny.reference.config)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    source = open_gguf(path)
    assert loaded["tensors"].keys() == source.names()
    for name, tensor in loaded["tensors"].items():
        assert torch.equal(read(source, name), tensor), name


def blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> NDArray[Any]:
    """Random numbers in a format; K-quants are random bytes with sensible scales."""
    rng = np.random.default_rng(int(kind))
    form = GGUF_FORMATS[kind.name.lower()]
    if form.name not in SCALE_OFFSETS:
        return quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    rows = random_blocks(form, math.prod(shape[:-1]), shape[-1], rng).numpy()
    return rows.reshape(*shape[:-1], -1)


def write_types(path: Path, kind: gguf.GGMLQuantizationType) -> dict[str, NDArray[Any]]:
    """Writes one Mixtral layer's queries and experts in one format; returns the raw rows."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}.items():
        add_value(writer, f"llama.{key}", value)
    writer.add_expert_count(3)
    raw = {
        "blk.0.attn_q.weight": blocks(kind, (ROWS, COLS)),
        "blk.0.attn_v.weight": blocks(kind, (ROWS, COLS)),
        "blk.0.ffn_down_exps.weight": blocks(kind, (3, ROWS, COLS)),
    }
    for name, array in raw.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    finish(writer)
    return raw


@pytest.mark.parametrize("format_name", GGUF_FORMATS)
def test_every_tensor_type_keeps_its_bytes_and_casts_as_gguf_does(format_name: str, tmp_path: Path):
    kind = gguf.GGMLQuantizationType[format_name.upper()]
    raw = write_types(tmp_path / "model.gguf", kind)
    source = open_gguf(tmp_path / "model.gguf")
    cast = CastSource(source, "float32")
    expected = {
        "model.layers.0.self_attn.v_proj.weight": raw["blk.0.attn_v.weight"],
        "model.layers.0.block_sparse_moe.experts.2.w2.weight": raw["blk.0.ffn_down_exps.weight"][2],
    }
    for name, rows in expected.items():
        weight = source.matrix(name)
        assert weight.format == GGUF_FORMATS[format_name]
        assert (weight.rows, weight.cols) == (ROWS, COLS) == source.shape(name)
        assert weight.data.contiguous().view(torch.uint8).numpy().tobytes() == rows.tobytes()
        assert np.array_equal(cast.matrix(name).data.numpy(), dequantize(rows, kind))
    queries = cast.matrix("model.layers.0.self_attn.q_proj.weight").data.numpy()
    stored = dequantize(raw["blk.0.attn_q.weight"], kind)
    assert np.array_equal(interleave(queries, HEADS), stored)
    assert not np.array_equal(queries, stored)


@pytest.mark.parametrize("harm", [None, "shape", "zero"])
def test_scales_beside_nvfp4_multiply_its_matrices(harm: str | None, tmp_path: Path):
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.NVFP4
    blocks = {
        "blk.0.attn_v": random_blocks(NVFP4, 8, 128, rng).numpy().reshape(8, -1),
        "blk.0.ffn_up_exps": random_blocks(NVFP4, 16, 128, rng).numpy().reshape(2, 8, -1),
    }
    for array in blocks.values():  # e4m3 without a sign, and no NaN
        array.reshape(-1, NVFP4.block_bytes)[:, :4] %= 0x7F
    scales = {
        "blk.0.attn_v": np.array([0.5], np.float32),
        "blk.0.ffn_up_exps": np.array([2.0, 3.0], np.float32),
    }
    if harm is not None:
        scales["blk.0.ffn_up_exps"] = np.zeros(2 if harm == "zero" else 3, np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    for name, array in blocks.items():
        writer.add_tensor(f"{name}.weight", array, raw_dtype=kind)
        writer.add_tensor(f"{name}.scale", scales[name])
    finish(writer)
    if harm is not None:
        words = "expected f32 .2. beside blk.0.ffn_up" if harm == "shape" else "no scales"
        with pytest.raises(WeightsError, match=f"ffn_up_exps.scale .*{words}"):
            open_gguf(tmp_path / "m.gguf")
        return
    source = open_gguf(tmp_path / "m.gguf")
    wanted = {"model.layers.0.self_attn.v_proj.weight": (blocks["blk.0.attn_v"], 0.5)}
    for expert in range(2):
        rows = blocks["blk.0.ffn_up_exps"][expert]
        wanted[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"] = (rows, 2.0 + expert)
    assert source.names() == wanted.keys()
    for name, (rows, scale) in wanted.items():
        values = torch.from_numpy(dequantize(rows, kind)) * scale
        assert torch.equal(dequantize_rows(source.matrix(name), slice(None)), values)
        placement = DevicePlacement(source, torch.device("cpu"))
        (weight,) = placement.matrices({name: None})
        placement.finish()
        assert weight.planes is not None
        assert weight.layout is not None
        found = values_of(weight.layout, weight.planes, weight.cols)
        torch.testing.assert_close(found, values, rtol=1e-6, atol=0)


def test_reading_makes_no_second_copy_in_memory(tmp_path: Path):
    size = 64 * 2**20
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_tensor("output.weight", np.zeros((1024, size // 4096), np.float32))
    finish(writer)
    before = anonymous_bytes()
    matrix = open_gguf(tmp_path / "model.gguf").matrix("lm_head.weight").data
    assert matrix.sum() == 0
    assert anonymous_bytes() - before < size // 8


def test_a_model_split_over_files_is_read_from_any_of_them(tmp_path: Path):
    tiny = save_tiny("llama", tmp_path)
    expected = write_tiny_gguf(tmp_path / "whole.gguf", tiny)
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")
    half = len(whole.tensors) // 2
    for number, tensors in enumerate((whole.tensors[:half], whole.tensors[half:]), start=1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "llama")
        if number == 1:
            for key, value in metadata_of(tiny.config).items():
                add_value(writer, f"llama.{key}", value)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        finish(writer)
    for number in (1, 2):
        source = open_gguf(tmp_path / f"m-{number:05}-of-00002.gguf")
        assert source.names() == expected.keys()
        name = "model.layers.2.self_attn.k_proj.weight"
        assert torch.equal(read(source, name), torch.from_numpy(expected[name]))
    shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / "other.gguf")
    with pytest.raises(WeightsError, match=r"other\.gguf is one of 2 parts.* have the names"):
        open_gguf(tmp_path / "other.gguf")
    shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(WeightsError, match=r"both in m-00001-of-00002\.gguf and in m-00002-of-"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(WeightsError, match=r"m-00002-of-00002\.gguf does not exist"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_gate_and_up_in_one_tensor_must_be_of_one_size(tmp_path: Path):
    odd = {"blk.0.ffn_gate_up_exps.weight": np.zeros((2, 63, 64), np.float32)}
    path = write_values(tmp_path / "m.gguf", "qwen3moe", {}, odd)
    with pytest.raises(WeightsError, match="has 63 rows, which gate and up cannot share"):
        open_gguf(path)


def test_an_unknown_tensor_keeps_its_name_so_that_it_is_reported(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "qwen2")
    writer.add_tensor("blk.0.ssm_conv1d.weight", np.zeros((2, 2), np.float32))
    finish(writer)
    assert open_gguf(tmp_path / "odd.gguf").names() == {"blk.0.ssm_conv1d.weight"}


@pytest.mark.parametrize("heads", [None, 0, 3])
def test_a_head_count_that_does_not_fit_the_queries_is_refused(heads: int | None, tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if heads is not None:
        writer.add_head_count(heads)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float32))
    finish(writer)
    with pytest.raises(WeightsError, match=rf"attn_q\.weight has 8 rows, which {heads} heads"):
        open_gguf(tmp_path / "m.gguf")


def test_a_tensor_type_that_is_not_known_is_refused_with_the_known_ones(tmp_path: Path):
    kind = gguf.GGMLQuantizationType.Q8_K
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = np.zeros((1, 292), np.uint8)
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=r"output\.weight .* Q8_K; known are F32, F16"):
        open_gguf(tmp_path / "m.gguf")


def test_a_truncated_file_names_the_tensor_that_is_cut_off(tmp_path: Path):
    tiny = save_tiny("llama", tmp_path)
    path = tmp_path / "m.gguf"
    write_tiny_gguf(path, tiny)
    last, tensor = max(read_gguf(path).tensors.items(), key=lambda item: item[1].start)
    path.write_bytes(path.read_bytes()[: tensor.start + 4])
    with pytest.raises(WeightsError, match=rf"is truncated: {last} ends at byte"):
        open_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf file at all"])
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(OctavoError, match=r"m\.gguf"):
        open_gguf(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_types(path, gguf.GGMLQuantizationType.Q8_0)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(150))
def test_random_damage_to_the_header_never_raises_anything_unexpected(
    seed: int, small_file: bytes, tmp_path: Path
):
    rng = random.Random(seed)
    content = bytearray(small_file)
    for _ in range(rng.randrange(4)):
        content[rng.randrange(400)] = rng.randrange(256)
    path = tmp_path / "m.gguf"
    path.write_bytes(content[: rng.choice([len(content), rng.randrange(500)])])
    with contextlib.suppress(OctavoError):
        source = open_gguf(path)
        for name in source.names():
            read(source, name)


def test_the_numbers_of_tensor_types_are_those_of_ggml():
    kinds = {kind.name.lower(): kind.value for kind in gguf.GGMLQuantizationType}
    assert {name: kinds[name] for name in GGUF_FORMATS} == TENSOR_TYPES
