"""Models that keep their KV in fewer bits, as a user meets them: nothing around a request changes
its tokens, as a key is rounded once, when it is written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, ConfigError, RequestOutput, SamplingParams
from octavo.errors import WeightsError
from tests.models.tiny import save_tiny

VOCAB = 211
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_WINDOWS = _LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LATENT = _LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
_LATENT.pop("head_dim")
MODELS = {"llama": _LLAMA, "windows": _WINDOWS, "latent": _LATENT}
CASES = [
    ("llama", "int8/int4"),
    ("windows", "int4/fp8"),
    ("latent", "int4"),
]
IDS = [f"{name}-{formats.replace('/', '-')}" for name, formats in CASES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = str(folder)
    return found


@contextmanager
def engine(folder: str, formats: str, **options: Any) -> Iterator[LLM]:
    torch.set_num_threads(1)
    defaults: dict[str, Any] = {
        "device": "cpu",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "poison_freed_blocks": True,
        "num_threads": 1,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2**20,
    }
    llm = LLM(folder, kv_cache_dtype=formats, **{**defaults, **options})
    try:
        yield llm
        llm._core.check()
        assert llm.stats().num_used_blocks == 0
    finally:
        llm.close()


def prompts_of(*lengths: int) -> list[list[int]]:
    draw = random.Random(sum(lengths))
    return [[draw.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=3, **more
    )


def scores(output: RequestOutput, choice: int = 0) -> list[list[tuple[int, float]]]:
    """Tokens and their log-probabilities, to compare bit by bit."""
    logprobs = output.outputs[choice].logprobs
    assert logprobs is not None
    return [[(one.token_id, one.logprob) for one in place.values()] for place in logprobs]


@pytest.mark.parametrize(("name", "formats"), CASES, ids=IDS)
def test_alone_batched_chunked_cached_forked_and_preempted_are_equal_bit_by_bit(
    folders: dict[str, str], name: str, formats: str
) -> None:
    prompts = prompts_of(90, 17, 40, 64)
    with engine(folders[name], formats, prefix_caching="off") as llm:
        alone = [scores(llm.generate(p, greedy(24), use_tqdm=False)[0]) for p in prompts]
        assert all(score == score for one in alone for step in one for _, score in step)
        batch = llm.generate(prompts, greedy(24), use_tqdm=False)
        assert [scores(one) for one in batch] == alone
        page = llm.plan.layout.chunk_bytes
    with engine(folders[name], formats, max_num_batched_tokens=19) as llm:
        chunked = llm.generate(prompts, greedy(24), use_tqdm=False)
        assert [scores(one) for one in chunked] == alone
        cached = llm.generate(prompts, greedy(24), use_tqdm=False)
        assert [scores(one) for one in cached] == alone
        assert sum(one.num_cached_tokens for one in cached) > 0
        (forked,) = llm.generate(prompts[1], greedy(24, n=3), use_tqdm=False)
        assert [scores(forked, choice) for choice in range(3)] == [alone[1]] * 3
    if name != "windows":  # every layer sees all, so that memory runs out
        with engine(
            folders[name], formats, kv_cache_memory_bytes=page * 15, max_model_len=128
        ) as llm:
            preempted = llm.generate(prompts, greedy(24), use_tqdm=False)
            assert [scores(one) for one in preempted] == alone
            assert llm.stats().num_preemptions > 0


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_formats_and_any_company_gives_the_same_tokens(
    folders: dict[str, str], seed: int
) -> None:
    draw = random.Random(seed)
    names = ("float32", "bfloat16", "fp8", "int8", "int4")
    formats = f"{draw.choice(names)}/{draw.choice(names)}"
    name = draw.choice(("llama", "windows"))
    lengths = [draw.randint(1, 50) for _ in range(draw.randint(2, 3))]
    prompts = prompts_of(*lengths)
    prompts.append(prompts[0][: lengths[0] // 2 + 1] + prompts[1])  # shares a prefix
    with engine(folders[name], formats) as llm:
        alone = [scores(llm.generate(p, greedy(6), use_tqdm=False)[0]) for p in prompts]
    chunk = draw.randint(16, 64)
    with engine(folders[name], formats, max_num_batched_tokens=chunk) as llm:
        for _ in range(2):
            found = llm.generate(prompts, greedy(6), use_tqdm=False)
            assert [scores(one) for one in found] == alone


def test_fewer_bits_stay_near_float32_and_take_less(folders: dict[str, str]) -> None:
    prompts = prompts_of(80, 33)
    first: dict[str, list[float]] = {}
    taken: dict[str, int] = {}
    for formats in ("float32", "int8", "fp8", "int4"):
        with engine(folders["llama"], formats) as llm:
            taken[formats] = llm.plan.kv_token_bytes
            found = llm.generate(prompts, greedy(1), use_tqdm=False)
            first[formats] = [score for one in found for _, score in scores(one)[0]]
    exact = torch.tensor(first["float32"])
    errors = {
        formats: (torch.tensor(found) - exact).abs().max() for formats, found in first.items()
    }
    assert errors["int8"] < 0.02
    assert errors["fp8"] < 0.1
    assert taken["fp8"] == taken["int8"] == taken["float32"] * 66 // 256
    assert taken["int4"] == taken["float32"] * 36 // 256


def test_formats_that_cannot_be_served_are_refused_with_those_that_can(
    folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"int3.*use float32, .*int8, int4") as caught:
        LLM(folders["llama"], kv_cache_dtype="int3", device="cpu")
    assert caught.value.field == "kv_cache_dtype"
    with (
        pytest.raises(ConfigError, match="one vector; use int8 or int4"),
        engine(folders["latent"], "int8/int4"),
    ):
        pass
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA | {"head_dim": 24}))
    with (
        pytest.raises(ConfigError, match=r"packs 64 numbers.*use .*fp8, int8$") as caught,
        engine(str(tmp_path), "int4"),
    ):
        pass
    assert caught.value.field == "kv_cache_dtype"


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with scales, those of the values of the second layer too small."""
    folder = tmp_path_factory.mktemp("scaled")
    tiny = save_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(tiny.config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        tensors[f"{at}.k_scale"] = torch.tensor(0.0625)
        tensors[f"{at}.v_scale"] = torch.tensor([0.03125])
        tensors[f"{at}.q_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_scales_of_a_checkpoint_are_what_fp8_is_divided_by(scaled: Path) -> None:
    (prompt,) = prompts_of(30)
    first: dict[str, torch.Tensor] = {}
    for formats in ("float32", "fp8"):
        with engine(str(scaled), formats, load_format="auto") as llm:
            (found,) = llm.generate(prompt, greedy(4), use_tqdm=False)
            first[formats] = torch.tensor([score for _, score in scores(found)[0]])
            runner: Any = llm._core._runner
            if formats == "fp8":
                for name, scale in (("key_scale", 0.0625), ("value_scale", 0.03125)):
                    plane = runner.storage.layer(0).planes[name].float()
                    # Of a cached block at the least; what was never written may be anything.
                    assert (plane == scale).sum() >= plane[0].numel()
    assert (first["fp8"] - first["float32"]).abs().max() < 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("k_scale", [-1.0], "must be above 0"),
        ("v_scale", [1.0, 2.0, 3.0, 4.0, 5.0], "has 5 numbers"),
    ],
)
def test_scales_that_are_none_are_refused(
    scaled: Path, tmp_path: Path, name: str, value: list[float], message: str
) -> None:
    for path in scaled.iterdir():
        shutil.copy(path, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.self_attn.{name}"] = torch.tensor(value)
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        pytest.raises(WeightsError, match=message),
        engine(str(tmp_path), "fp8", load_format="auto"),
    ):
        pass
    with engine(str(tmp_path), "int8", load_format="auto"):
        pass  # they are fp8's alone
