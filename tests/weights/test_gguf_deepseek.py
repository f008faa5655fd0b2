"""Latent attention in GGUF: DeepSeek's and GLM's models mean what transformers says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

from octavo import LLM, SamplingParams
from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.registry import read_spec
from octavo.weights.cast import CastSource
from octavo.weights.gguf_config import config_of
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_source import open_gguf
from octavo.weights.placement import DevicePlacement
from octavo.weights.split import Split
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.reading import read
from tests.weights.tiny_gguf import add_value, finish, metadata_of, write_values

Kind = gguf.GGMLQuantizationType
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_k": Kind.Q4_K}
ARCHITECTURE = "deepseek2"
UP = "model.layers.1.self_attn.kv_b_proj.weight"
BLOCKS = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 256,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""Sizes that blocks of 32 divide, and of what a layer multiplies those of 256."""


def yarn(mscale: float) -> dict[str, Any]:
    values = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": "yarn", **values, **sharpness(mscale)}}


def sharpness(mscale: float) -> dict[str, float]:
    return {"mscale": mscale, "mscale_all_dim": mscale}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how its file is written."""

    model: str
    more: dict[str, Any]
    is_split: bool = True
    """kv_b is in two tensors, as newer converters write it."""
    kinds: tuple[str, ...] = ("f32",)
    """The matrices' number formats, in turn, where their columns allow it."""
    up: str | None = None
    """That of the keys' half of kv_b."""
    num_predictors: int = 0
    """Layers behind the model's, which predict tokens further ahead."""


CASES = {
    "v2": Case(model="deepseek-v2", more={}),
    "v2-whole": Case(model="deepseek-v2", more={}, is_split=False),
    "v2-lite": Case(model="deepseek-v2-lite", more=yarn(0.707)),
    "v2-lite-q8-whole": Case(
        model="deepseek-v2-lite",
        more={**BLOCKS, "q_lora_rank": None, **yarn(0.707)},
        is_split=False,
        kinds=("q8_0",),
    ),
    "v3": Case(model="deepseek-v3", more=yarn(1.0), up="f16"),
    "v3-mixture": Case(
        model="deepseek-v3", more={**BLOCKS, **yarn(1.0)}, kinds=("q4_k", "q8_0"), up="q8_0"
    ),
    "glm": Case(model="glm4-moe-lite", more={}, kinds=("f16",), num_predictors=2),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model with the numbers of its file."""

    case: Case
    model: TinyModel
    path: Path


@pytest.fixture(scope="module", params=sorted(CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    folder, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    model = save_tiny(case.model, folder / "model", **case.more)
    return Made(case=case, model=model, path=written(model, case, folder / "model.gguf"))


def written(model: TinyModel, case: Case, path: Path) -> Path:
    """Writes the model as llama.cpp's converters do, and gives it the numbers of the file."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    num_layers = model.config["num_hidden_layers"]
    predictors = range(num_layers, num_layers + case.num_predictors)
    of_layers = {"block_count": predictors.stop, "nextn_predict_layers": case.num_predictors}
    for key, value in (keys_of(model.config, is_split=case.is_split) | of_layers).items():
        add_value(writer, f"{ARCHITECTURE}.{key}", value)
    for index, (name, tensor) in enumerate(file_tensors(model, is_split=case.is_split)):
        kind = Kind.F32
        if name.endswith(".weight") and tensor.dim() > 1 and "ffn_gate_inp" not in name:
            is_up = case.up is not None and "attn_k_b" in name
            kind = KINDS[str(case.up) if is_up else case.kinds[index % len(case.kinds)]]
        blocks = stored(tensor.numpy(), kind)
        if blocks is None:
            writer.add_tensor(name, tensor.numpy().copy())
            continue
        writer.add_tensor(name, blocks, raw_dtype=kind)
        tensor.copy_(torch.from_numpy(dequantize(blocks, kind)))
    for layer in predictors:
        for name in ("nextn.eh_proj", "attn_norm", "attn_k_b", "ffn_gate_inp"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    return path


def stored(numbers: NDArray[np.float32], kind: Kind) -> NDArray[Any] | None:
    """Returns what a file has of the numbers, of Q4_K other numbers; None where it has floats."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == Kind.F32 or numbers.shape[-1] % width:
        return None
    if kind != Kind.Q4_K:
        return quantize(np.ascontiguousarray(numbers), kind)
    shape = (*numbers.shape[:-1], numbers.shape[-1] // width, size)
    blocks = np.random.default_rng(numbers.size).integers(0, 256, shape, np.uint8)
    blocks[..., :4] = np.array([0.0006, 0.0045], np.float16).view(np.uint8)  # d and dmin
    return blocks.reshape(*numbers.shape[:-1], -1)


def keys_of(config: Any, *, is_split: bool) -> dict[str, Any]:
    """Returns the keys, without the architecture's prefix."""
    rank, rope_size = config["kv_lora_rank"], config["qk_rope_head_dim"]
    head_size, is_v2 = config["qk_nope_head_dim"] + rope_size, "v2" in config["model_type"]
    ends = {"key_length": head_size, "value_length": config["v_head_dim"]}
    mla = {f"attention.{key}_mla": size for key, size in ends.items()}
    if is_split:
        ends = {"key_length": rank + rope_size, "value_length": rank}
    rope = config["rope_parameters"]
    first = config.get("first_k_dense_replace", 0)
    if "mlp_layer_types" in config:
        first = config["mlp_layer_types"].count("dense")
    values = {
        **metadata_of(config),
        **{f"attention.{key}": size for key, size in ends.items()},
        **(mla if is_split else {}),
        "attention.head_count_kv": 1 if is_split else config["num_attention_heads"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "rope.dimension_count": rope_size,
        "leading_dense_block_count": first,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": None if is_v2 else int(config["norm_topk_prob"]),
        "expert_gating_func": 1 if is_v2 else 2,
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }
    if "mscale_all_dim" in rope:
        values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {key: value for key, value in values.items() if value is not None}


def file_tensors(model: TinyModel, *, is_split: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields views of the model's numbers by the names of the file."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[ARCHITECTURE], model.config["num_hidden_layers"])
    for name, tensor in model.reference.state_dict().items():
        base, _, suffix = name.rpartition(".")
        if ".experts." in name:
            layer, part = name.split(".")[2], suffix
            parts = {"down_proj": ["down"], "gate_up_proj": ["gate", "up"]}[part]
            for one, values in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
                yield f"blk.{layer}.ffn_{one}_exps.weight", values
        elif suffix == "e_score_correction_bias":
            yield f"{names.get_name(f'{base}.e_score_correction')}.bias", tensor
        elif is_split and base.endswith("kv_b_proj"):
            heads = tensor.view(model.config["num_attention_heads"], -1, tensor.shape[1])
            nope = model.config["qk_nope_head_dim"]
            for half, values in (("k", heads[:, :nope].mT), ("v", heads[:, nope:])):
                half_name = base.replace("kv_b_proj", f"{half}_b_proj")
                yield f"{names.get_name(half_name)}.weight", values
        else:
            yield f"{names.get_name(base)}.{suffix}", tensor


def test_a_file_means_what_the_checkpoint_means(made: Made) -> None:
    found, expected = (
        read_spec(config)[0] for config in (config_of(read_gguf(made.path)), made.model.config)
    )
    assert found.norm_eps == pytest.approx(expected.norm_eps)  # float32 in the file
    assert replace(found, norm_eps=expected.norm_eps) == expected


def test_a_tiny_file_says_what_transformers_says(made: Made) -> None:
    llm = LLM(
        str(made.path), device="cpu", skip_tokenizer_init=True, num_threads=1, max_model_len=128
    )
    prompt = np.random.default_rng(0).integers(0, 211, 40).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    llm.close()
    said = output.outputs[0]
    tokens = list(said.token_ids)
    with torch.inference_mode():
        logits = made.model.reference(torch.tensor([prompt + tokens])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert tokens == expected.argmax(dim=-1).tolist()
    assert said.logprobs is not None
    found = [entry[token].logprob for entry, token in zip(said.logprobs, tokens, strict=True)]
    assert found == pytest.approx(expected.max(dim=-1).values.tolist(), abs=1e-4)


def test_the_halves_of_kv_b_are_one_matrix_for_every_reader(made: Made) -> None:
    source = open_gguf(made.path)
    expected = made.model.reference.state_dict()[UP]
    assert source.shape(UP) == tuple(expected.shape)
    assert not [name for name in source.names() if name.startswith("blk.")]
    if not source.format(UP).is_block:
        assert torch.equal(read(source, UP).float(), expected)
    cast = CastSource(source, "bfloat16")
    assert torch.equal(read(cast, UP), expected.bfloat16())
    if source.layout(UP) is None:  # else it is packed
        placement = DevicePlacement(source, torch.device("cpu"))
        (up,) = placement.matrices({UP: None})
        placement.finish()
        is_of_blocks = made.case.up == "q8_0"
        assert up.data.dtype == (torch.bfloat16 if is_of_blocks else read(source, UP).dtype)
        assert torch.equal(up.data, read(source, UP).to(up.data.dtype))
    heads = Split(axis="rows", unit="heads", num_units=made.model.config["num_attention_heads"])
    if heads.num_units % 2 == 0:
        placement = DevicePlacement(cast, torch.device("cpu"), rank=1, size=2)
        (part,) = placement.matrices({UP: heads})
        placement.finish()
        assert torch.equal(part.data, expected[len(expected) // 2 :].bfloat16())


MLA = {
    "attention.kv_lora_rank": 16,
    "rope.dimension_count": 8,
    "attention.key_length": 24,
    "attention.value_length": 16,
    "attention.key_length_mla": 20,
    "attention.value_length_mla": 12,
    "attention.head_count_kv": 1,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_shared_count": 1,
}
EXPERTS = {
    "blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32),
    "blk.0.ffn_gate_exps.weight": np.zeros((4, 32, 64), np.float32),
}
CORRECTION = {"blk.0.exp_probs_b.bias": np.zeros(4, np.float32)}


def config_with(
    folder: Path, values: dict[str, Any], tensors: dict[str, Any] | None = None
) -> dict[str, Any]:
    path = folder / "model.gguf"
    write_values(path, ARCHITECTURE, MLA | values, EXPERTS | (tensors or {}))
    return config_of(read_gguf(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention.kv_lora_rank": None}, r"attention\.kv_lora_rank is missing"),
        ({"attention.key_length": 20}, r"key_length is 20; known is 24, kv_lora_rank \+"),
        ({"attention.value_length": 12}, r"value_length is 12; known is 16, kv_lora_rank"),
        ({"attention.value_length_mla": None}, r"value_length_mla is missing"),
        ({"attention.key_length_mla": 8}, r"key_length_mla is 8; known is more than rope"),
        ({"attention.head_count_kv": 2}, r"head_count_kv is 2; known is 1 or the number .* 4"),
        ({"attention.q_lora_rank": 8}, r"q_lora_rank is 8; known is 0, as there is no blk\.0"),
        ({"attention.temperature_scale": 0.1}, r"temperature_scale is 0\.1"),
        ({"expert_count": 0}, "expert_count is 0; known is a number of at least 1"),
        ({"expert_shared_count": None}, "expert_shared_count is missing"),
        ({"expert_feed_forward_length": 16}, r"feed_forward_length is 16; known is 32, the rows"),
        ({"expert_gating_func": 3}, r"expert_gating_func is 3; known is 1 or 2"),
        ({"expert_weights_norm": 1}, "expert_weights_norm is 1; known is false where"),
        ({"expert_group_count": 2}, "expert_group_used_count is missing"),
        ({"leading_dense_block_count": 1}, r"block_count is 1; known is 0, as layers without"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers is 1; known is less than"),
    ],
)
def test_keys_that_contradict_are_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config_with(tmp_path, values)


def test_a_rank_of_queries_is_that_of_their_tensor(tmp_path: Path) -> None:
    latents = {"blk.0.attn_q_a.weight": np.zeros((8, 64), np.float32)}
    assert config_with(tmp_path, {"attention.q_lora_rank": 8}, latents)["q_lora_rank"] == 8
    with pytest.raises(UnsupportedModelError, match=r"q_lora_rank is None; known is 8, the rows"):
        config_with(tmp_path, {}, latents)


@pytest.mark.parametrize(
    ("values", "tensors", "expected"),
    [
        ({}, {}, "deepseek_v2"),
        ({"expert_gating_func": 1}, {}, "deepseek_v2"),
        ({}, CORRECTION, "deepseek_v3"),
        ({"expert_gating_func": 2}, CORRECTION, "deepseek_v3"),
    ],
)
def test_the_scores_tell_the_families_apart(
    values: dict[str, Any], tensors: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert config_with(tmp_path, values, tensors)["model_type"] == expected


def test_a_softmax_has_no_corrections(tmp_path: Path) -> None:
    message = r"expert_gating_func is 1; known is 2 \(sigmoid\), as there is exp_probs_b"
    with pytest.raises(UnsupportedModelError, match=message):
        config_with(tmp_path, {"expert_gating_func": 1}, CORRECTION)


@pytest.mark.parametrize(
    ("keys", "values"), [((4, 16, 12), (3, 12, 16)), ((4, 16, 12), (4, 12, 8)), ((4, 16), (4, 16))]
)
def test_halves_of_kv_b_must_fit(
    keys: tuple[int, ...], values: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    halves = {
        "blk.0.attn_k_b.weight": np.zeros(keys, np.float32),
        "blk.0.attn_v_b.weight": np.zeros(values, np.float32),
    }
    write_values(path, ARCHITECTURE, MLA, EXPERTS | halves)
    with pytest.raises(WeightsError, match=r"attn_k_b\.weight \[.*attn_v_b\.weight \[.* must be"):
        open_gguf(path)


def test_a_lone_half_or_one_too_many_keeps_its_name(tmp_path: Path) -> None:
    keys = {"blk.0.attn_k_b.weight": np.zeros((4, 16, 12), np.float32)}
    whole = {"blk.0.attn_kv_b.weight": np.zeros((96, 16), np.float32)}
    for tensors in (keys, keys | whole):
        path = write_values(tmp_path / "model.gguf", ARCHITECTURE, MLA, EXPERTS | tensors)
        assert "blk.0.attn_k_b.weight" in open_gguf(path).names()
