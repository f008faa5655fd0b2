"""Matrices in every published format, and a checkpoint of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.weights.published.source import PackedSource
from octavo.weights.quantization import read_quantization
from octavo.weights.safetensors_source import open_safetensors
from tests.weights.packing import Written, awq, compressed, fp8, gptq

NAME = "model.layers.0.self_attn.o_proj"


GROUP_ARGS = {"strategy": "group", "type": "int", "num_bits": 4}


CT = "compressed-tensors"


def _reordered(written: Written, rng: np.random.Generator, group: int) -> Written:
    """Returns a matrix of compressed-tensors whose columns belong to groups out of order."""
    cols = written.values.shape[1]
    order = torch.from_numpy(rng.permutation(cols) // group).int()
    scales = written.tensors["weight_scale"].float()
    in_order = torch.arange(cols) // group
    codes = (written.values / scales[:, in_order]).round()
    tensors = written.tensors | {"weight_g_idx": order}
    return Written(tensors, codes * scales[:, order.long()])


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
    **{
        f"gptq {bits} bits out of order": (
            lambda r, bits=bits: gptq(r, 32, 256, 64, bits, less_one=True, reordered=True),
            {"quant_method": "gptq", "bits": bits, "desc_act": True},
            "int8_64" if bits == 8 else "int4_64_f16",
        )
        for bits in (3, 4, 8)
    },
    "packed out of order": (
        lambda r: _reordered(compressed(
            r, 40, 224, "pack-quantized", group_size=32, symmetric=True, **GROUP_ARGS
        ), r, 32),
        {"quant_method": CT},
        "int4_32",
    ),
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


def opened(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> PackedSource:
    save_file(dict(tensors), folder / "model.safetensors")
    quantization = read_quantization({"quantization_config": config}, None)
    source = open_safetensors(folder, "llama", quantization)
    assert isinstance(source, PackedSource)
    return source


def named(written: Written, name: str = NAME) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in written.tensors.items()}
