"""Copies on a device equal what the host maps; ranks' parts make the whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from safetensors.torch import save_file

from octavo.errors import ConfigError, UnsupportedModelError, WeightsError
from octavo.formats import GGUF_FORMATS
from octavo.kernels.dequantize import dequantize_rows
from octavo.kernels.planes import values_of
from octavo.weights import source as source_module
from octavo.weights import staging as staging_module
from octavo.weights.cast import CastSource
from octavo.weights.dummy import DummySource
from octavo.weights.gguf_source import open_gguf
from octavo.weights.placement import DevicePlacement, HostPlacement, Split
from octavo.weights.quantized import QuantizedSource
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import MappedFile, MappedSource, StoredTensor, TensorSource
from tests.models.tiny import save_tiny
from tests.weights.reading import mapped_bytes
from tests.weights.tiny_gguf import finish, write_tiny_gguf

CPU = torch.device("cpu")


def dummy(folder: Path) -> TensorSource:
    return DummySource({"m": (300, 700), "n": (3000, 3000), "v": (9,)}, "bfloat16", seed=3)


def shards(folder: Path) -> TensorSource:
    save_tiny("qwen2-moe", folder / "one").reference.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return open_safetensors(folder, "qwen2_moe")


def stacked_experts(folder: Path) -> TensorSource:
    tiny = save_tiny("mixtral", folder / "usual")
    tiny.reference.save_pretrained(folder, save_original_format=False)
    return open_safetensors(folder, "mixtral")


def rounded(folder: Path) -> TensorSource:
    save_tiny("llama", folder)
    return CastSource(open_safetensors(folder, "llama"), "bfloat16")


def gguf_file(folder: Path) -> TensorSource:
    """Queries and keys of `llama` files are in another order than the models'."""
    write_tiny_gguf(folder / "model.gguf", save_tiny("mixtral", folder))
    return CastSource(open_gguf(folder / "model.gguf"), "float16")


@pytest.mark.parametrize("make", [dummy, shards, stacked_experts, rounded, gguf_file])
def test_every_tensor_on_a_device_equals_that_on_the_host(
    make: Callable[[Path], TensorSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (source_module, staging_module):
        monkeypatch.setattr(module, "STAGING_BYTES", 1000)  # several pieces per matrix
    source = make(tmp_path)
    host, device = HostPlacement(source), DevicePlacement(source, CPU)
    names = sorted(source.names())
    matrices = [name for name in names if len(source.shape(name)) == 2]
    placed = [device.matrices({name: None})[0] for name in matrices]
    device.finish()
    for name, weight in zip(matrices, placed, strict=True):
        (expected,) = host.matrices({name: None})
        assert torch.equal(weight.data, expected.data), name
        assert (weight.format, weight.rows, weight.cols) == (
            expected.format,
            expected.rows,
            expected.cols,
        )
    for name in set(names) - set(matrices):
        assert torch.equal(device.vector(name), host.vector(name)), name
    host.finish()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("make", ["mapped", "dummy", "interleaved"])
def test_the_parts_of_all_ranks_make_the_whole(make: str, size: int, tmp_path: Path):
    query, output = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    if make == "dummy":
        source: TensorSource = DummySource({query: (72, 48), output: (212, 48)}, "float32", seed=1)
    else:
        tiny = save_tiny("llama", tmp_path)
        write_tiny_gguf(tmp_path / "m.gguf", tiny)
        is_mapped = make == "mapped"
        source = (
            open_safetensors(tmp_path, "llama") if is_mapped else open_gguf(tmp_path / "m.gguf")
        )
    rows = Split(axis="rows", unit="rows", num_units=source.shape(query)[0])
    cols = Split(axis="cols", unit="columns", num_units=48)
    row_parts, col_parts = [], []
    for rank in range(size):
        placement = DevicePlacement(source, CPU, rank, size)
        (row_part,) = placement.matrices({query: rows})
        (col_part,) = placement.matrices({output: cols})
        placement.finish()
        assert (row_part.rows, col_part.cols) == (72 // size, 48 // size)
        row_parts.append(row_part.data)
        col_parts.append(col_part.data)
    assert torch.equal(torch.cat(row_parts), source.matrix(query).data)
    assert torch.equal(torch.cat(col_parts, dim=1), source.matrix(output).data)


def test_ranks_that_outnumber_the_kv_heads_have_the_same_one(tmp_path: Path):
    save_file(
        {"k": torch.arange(24.0).view(6, 4), "b": torch.arange(6.0)}, tmp_path / "m.safetensors"
    )
    source = open_safetensors(tmp_path, "llama")
    heads = Split(axis="rows", unit="kv heads", num_units=2, may_repeat=True)
    for rank, first in enumerate([0, 0, 3, 3]):
        placement = DevicePlacement(source, CPU, rank, 4)
        (key,) = placement.matrices({"k": heads})
        placement.finish()
        assert torch.equal(key.data, source.matrix("k").data[first : first + 3])
        assert placement.vector("b", heads).tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize(("size", "may_repeat"), [(4, False), (4, True), (12, False)])
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(size: int, may_repeat: bool):
    split = Split(axis="rows", unit="query heads", num_units=6, may_repeat=may_repeat)
    with pytest.raises(ConfigError, match="6 query heads evenly; use 1 or 2 or 3 or 6") as caught:
        split.part(0, size)
    assert caught.value.field == "tensor_parallel_size"


def test_matrices_of_two_formats_cannot_be_one_stack(tmp_path: Path):
    tensors = {"q": torch.ones(2, 2), "k": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"q is in f32 but k in bf16.*--dtype bfloat16"):
        DevicePlacement(source, CPU).stack({"q": None, "k": None})
    placement = DevicePlacement(CastSource(source, "bfloat16"), CPU)
    weights = placement.matrices({"q": None, "k": None})
    placement.finish()
    assert all(torch.equal(w.data, torch.ones(2, 2, dtype=torch.bfloat16)) for w in weights)


def test_packed_rows_become_planes_of_whole_groups(tmp_path: Path):
    values = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    save_file({"up.weight": values}, tmp_path / "model.safetensors")
    source = QuantizedSource(open_safetensors(tmp_path, "llama"), "int8")
    expected = dequantize_rows(source.matrix("up.weight"), slice(0, 4))
    rows = Split(axis="rows", unit="rows", num_units=4)
    placement = DevicePlacement(source, CPU, rank=1, size=2)
    (weight,) = placement.matrices({"up.weight": rows})
    placement.finish()
    assert weight.planes is not None
    assert weight.layout is not None
    assert torch.equal(values_of(weight.layout, weight.planes, 128), expected[2:])
    cols = Split(axis="cols", unit="columns", num_units=2)
    with pytest.raises(
        ConfigError, match=r"cuts the 128 columns of up\.weight .* use 1, or --dtype"
    ):
        placement.matrices({"up.weight": cols})


def test_a_block_format_is_refused_by_ranks_of_a_cpu_unless_it_is_cast(tmp_path: Path):
    kind = gguf.GGMLQuantizationType.TQ1_0
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    raw = quantize(torch.randn(4, 256).numpy(), kind)
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    finish(writer)
    source = open_gguf(tmp_path / "m.gguf")
    names = {"lm_head.weight": None}
    with pytest.raises(UnsupportedModelError, match=r"block format tq1_0.*--dtype bfloat16"):
        DevicePlacement(source, CPU, keeps_packed=False).matrices(names)
    cast = CastSource(source, "bfloat16")
    cols = Split(axis="cols", unit="columns", num_units=2)
    placement = DevicePlacement(cast, CPU, rank=1, size=2)
    (weight,) = placement.matrices(dict.fromkeys(names, cols))
    placement.finish()
    assert torch.equal(weight.data, cast.matrix("lm_head.weight").data[:, 128:])


def test_a_file_that_got_shorter_is_named(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({str(n): torch.zeros(64, 64) for n in range(30)}, path)
    placement = DevicePlacement(open_safetensors(tmp_path, "llama"), CPU)
    placement.matrices({str(n): None for n in range(30)})
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(WeightsError, match=r"model\.safetensors ended at byte \d+"):
        placement.finish()


def test_copying_from_a_file_maps_none_of_it(tmp_path: Path):
    size = 64 * 2**20
    save_file({"m": torch.zeros(1024, size // 4096)}, tmp_path / "model.safetensors")
    placement = DevicePlacement(open_safetensors(tmp_path, "llama"), CPU)
    placement.matrices({"m": None})
    before = mapped_bytes()
    placement.finish()
    assert mapped_bytes() - before < size // 8


def test_the_host_copies_nothing(tmp_path: Path):
    save_file({"m": torch.ones(8, 8), "n": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path, "llama")
    weights = HostPlacement(source).matrices({"m": None, "n": None})
    for name, weight in zip("mn", weights, strict=True):
        assert weight.data.data_ptr() == source.matrix(name).data.data_ptr()


@pytest.mark.parametrize("name", ["iq2_xxs", "iq1_m", "tq2_0"])
def test_blocks_without_planes_go_to_a_gpu_as_they_are_stored(name: str, tmp_path: Path):
    """Rank by rank, by rows and by columns of whole blocks; those of a CPU refuse them."""
    form, rng = GGUF_FORMATS[name], np.random.default_rng(0)
    stored = torch.from_numpy(rng.integers(0, 256, (6, form.row_bytes(1024)), dtype=np.uint8))
    (tmp_path / "blocks").write_bytes(stored.numpy().tobytes())
    one = StoredTensor(
        file=MappedFile(tmp_path / "blocks"),
        start=0,
        shape=(6, 1024),
        format=form,
        format_name=name,
    )
    source = MappedSource({"w.weight": one})
    for axis in ("rows", "cols"):
        split = Split(axis=axis, unit=axis, num_units=6 if axis == "rows" else 1024)
        parts = []
        for rank in range(2):
            placement = DevicePlacement(source, torch.device("cpu"), rank, 2)
            (weight,) = placement.matrices({"w.weight": split})
            placement.finish()
            assert weight.planes is None
            assert (weight.table is not None) == form.has_table
            parts.append(weight.data)
        assert torch.equal(torch.cat(parts, dim=int(axis == "cols")), stored)
    third = Split(axis="cols", unit="columns", num_units=1024)
    with pytest.raises(ConfigError, match=f"group of 256 that {name} keeps together; use 1 or 2"):
        DevicePlacement(source, torch.device("cpu"), 0, 8).matrices({"w.weight": third})
    on_cpu = DevicePlacement(source, torch.device("cpu"), 0, 2, keeps_packed=False)
    with pytest.raises(UnsupportedModelError, match=f"block format {name}, which cpu cannot"):
        on_cpu.matrices({"w.weight": None})
