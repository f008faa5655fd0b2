"""Packed weights give the same tokens through the kernels of a GPU as on the CPU."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.llm import LLM
from octavo.models.family import weight_shapes
from octavo.models.registry import read_spec
from octavo.request import SamplingParams
from tests.kernels.triton.interpreter import DEVICE

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "dtype": "float32",
    "eos_token_id": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_tokens_equal_those_of_the_cpu(quantization: str, tmp_path: Path):
    if DEVICE != "cpu":
        pytest.skip("both back ends run on the CPU here, Triton through its interpreter")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(*read_spec(CONFIG))
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = []
    for backend in ("reference", "triton"):
        llm = LLM(
            str(tmp_path),
            device="cpu",
            attention_backend=backend,
            quantization=quantization,
            max_model_len=32,
            max_num_seqs=2,
            max_num_batched_tokens=16,
            skip_tokenizer_init=True,
        )
        with contextlib.closing(llm):
            params = SamplingParams(temperature=0, max_tokens=3)
            outputs = llm.generate([[1, 5, 9], [2, 7]], params)
        found.append([out.outputs[0].token_ids for out in outputs])
    assert found[0] == found[1]
