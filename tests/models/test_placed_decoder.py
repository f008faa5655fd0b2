"""What the decoder asks of a placement: which matrices are one stack, and what each rank has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.kernels.reference import ReferenceOps
from octavo.kernels.weights import Stack, Weight
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.models.decoder import Decoder
from octavo.models.load_decoder import load_decoder
from octavo.models.registry import read_spec
from octavo.weights.placement import DevicePlacement, HostPlacement, Placement
from octavo.weights.safetensors_source import open_safetensors
from octavo.weights.source import TensorSource
from tests.models.tiny import CASES, TinyModel, save_tiny

CPU = torch.device("cpu")


def source_of(tiny: TinyModel) -> TensorSource:
    return open_safetensors(tiny.folder, tiny.config["model_type"])


def load(tiny: TinyModel, placement: Placement) -> Decoder:
    return load_decoder(*read_spec(tiny.config), placement, ReferenceOps(1), 256)


def load_ranks(tiny: TinyModel, size: int) -> list[dict[str, Tensor]]:
    """Returns the tensors of each rank by path."""
    source = source_of(tiny)
    decoders = [load(tiny, DevicePlacement(source, CPU, rank, size)) for rank in range(size)]
    return [dict(tensors(decoder)) for decoder in decoders]


def tensors(part: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor below a dataclass or tuple with its path."""
    if isinstance(part, Tensor):
        yield path, part
    elif isinstance(part, tuple | Stack):
        for index, one in enumerate(part):
            yield from tensors(one, f"{path}.{index}")
    elif is_dataclass(part):
        for field in fields(part):
            if field.name == "within":  # the others beside it
                continue
            yield from tensors(getattr(part, field.name), f"{path}.{field.name}")


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_on_a_device_has_the_weights_of_one_on_the_host(case: str, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    host = dict(tensors(load(tiny, HostPlacement(source_of(tiny)))))
    (device,) = load_ranks(tiny, 1)
    assert host.keys() == device.keys()
    for path, tensor in host.items():
        assert torch.equal(device[path], tensor), path


def test_what_is_multiplied_at_once_is_one_stack(tmp_path: Path):
    pytest.importorskip("triton", reason="triton is not installed")
    from octavo.kernels.triton.experts.stacks import stacked_view
    from octavo.kernels.triton.product.matrices import matrices_of

    def is_one(*weights: Weight) -> bool:
        return len(matrices_of(weights)) == 1

    tiny = save_tiny("qwen2-moe", tmp_path)
    decoder = load(tiny, DevicePlacement(source_of(tiny), CPU))
    assert all(is_one(*layer.mixer.qkv) for layer in decoder.layers)
    dense, moe = decoder.layers[0].mlp, decoder.layers[1].mlp
    assert isinstance(dense, GatedMLP)
    assert isinstance(moe, MoE)
    assert moe.shared is not None
    assert is_one(*dense.gate_up)
    assert is_one(*moe.shared.gate_up)
    assert is_one(*moe.router.weights)
    assert len(moe.router.weights) == 2
    for experts in (moe.experts.gate, moe.experts.up, moe.experts.down):
        stack = stacked_view(experts)
        assert stack.is_contiguous()
        assert torch.equal(stack, torch.stack([weight.data for weight in experts]))


SPLIT = re.compile(
    r"qkv\.|qkv_bias|key_change|output\.|(mlp|shared)\.(gate_up\.[01]|down)\.data|experts"
    r"|qk_norm\.(query|key)$"
)


@pytest.mark.parametrize(("case", "size"), [("qwen2-moe", 2), ("qwen3-moe", 6), ("olmoe", 2)])
def test_the_parts_of_all_ranks_make_the_whole_decoder(case: str, size: int, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    (whole,) = load_ranks(tiny, 1)
    ranks = load_ranks(tiny, size)
    num_split = 0
    for path, tensor in whole.items():
        parts = [rank[path] for rank in ranks]
        if SPLIT.search(path) and not (".qk_norm" in path and case != "olmoe"):
            num_split += 1
            parts = [joined(path, parts, whole, ranks)]
        assert all(torch.equal(part, tensor) for part in parts), path
    assert num_split > len(whole) // 2


def joined(
    path: str, parts: list[Tensor], whole: dict[str, Tensor], ranks: list[dict[str, Tensor]]
) -> Tensor:
    if path.endswith("qkv_bias"):  # queries, keys and values of a rank follow each other
        weights = [path.replace("_bias", f".{index}.data") for index in range(3)]
        split = [
            part.split([len(rank[weight]) for weight in weights])
            for part, rank in zip(parts, ranks, strict=True)
        ]
        return torch.cat([torch.cat(one) for one in zip(*split, strict=True)])
    if re.search(r"qkv\.[12]", path):  # ranks may share a kv head
        num_parts = len(whole[path]) // len(parts[0])
        parts = parts[:: len(parts) // num_parts]
    return torch.cat(parts, dim=int(".output." in path or ".down." in path))


def test_a_rank_computes_its_heads_and_those_it_reads(tmp_path: Path):
    tiny = save_tiny("qwen3-moe", tmp_path)
    attention = load(tiny, DevicePlacement(source_of(tiny), CPU, 5, 6)).layers[0].mixer
    assert (attention.op.num_heads, attention.op.num_kv_heads) == (1, 1)


def test_heads_that_ranks_cannot_share_are_refused(tmp_path: Path):
    tiny = save_tiny("qwen3-moe", tmp_path)
    with pytest.raises(ConfigError, match="4 cannot share 6 query heads"):
        load(tiny, DevicePlacement(source_of(tiny), CPU, 0, 4))
