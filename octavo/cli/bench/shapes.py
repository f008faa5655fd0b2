"""Public model shapes, the sizes of the named workloads, and what they are held against.

Read by `octavo bench workloads` and by benchmarks/soak.py. Standard library only; weights are
random, so no checkpoint is needed. Requests come from fixed seeds: every engine gets the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A public model: its config.json without what matters in training alone."""

    config: Mapping[str, Any]
    max_model_len: int
    """Above some published contexts, so that the long workloads fit."""


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 2048,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _shape(text: str, max_model_len: int = 40960) -> Shape:
    return Shape(config=_COMMON | json.loads(text), max_model_len=max_model_len)


MODELS: dict[str, Shape] = {
    "qwen3-30b-a3b": _shape(
        """
        {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias":
        false, "bos_token_id": 151643, "eos_token_id": 151645, "decoder_sparse_step": 1,
        "head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "use_sliding_window": false,
        "vocab_size": 151936}
        """
    ),
    "qwen1.5-moe-a2.7b": _shape(
        """
        {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "bos_token_id":
        151643, "eos_token_id": 151643, "decoder_sparse_step": 1, "intermediate_size": 5632,
        "max_position_embeddings": 40960, "moe_intermediate_size": 1408, "norm_topk_prob":
        false, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size":
        5632, "use_sliding_window": false, "vocab_size": 151936}
        """
    ),
    "deepseek-v2-lite": _shape(
        """
        {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias":
        false, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102400}
        """
    ),
    "gpt-oss-20b": _shape(
        """
        {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": true,
        "eos_token_id": 200002, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor":
        32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
        "rope_theta": 150000, "sliding_window": 128, "vocab_size": 201088}
        """
    ),
    "mixtral-8x7b": _shape(
        """
        {"hidden_size": 4096, "rms_norm_eps": 1e-05, "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2, "intermediate_size":
        14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "sliding_window": null, "vocab_size": 32000}
        """,
        max_model_len=131072,  # 93 GB of weights: two GPUs of 80 GB, or --layers
    ),
}
"""Each runs on every device that holds it, the CPU too; a test runs each with one layer."""


class Mark(NamedTuple):
    """What a workload is held against, in the workload's unit."""

    peer: float | None
    """vLLM 0.26.0, 2026-11-22, one H100 80GB; the better one of its repeats."""
    goal: float | None


_MARKS = (
    ("start", Mark(93.8, 15), Mark(77.2, 15)),
    ("kv_tokens", Mark(112384, 140000), Mark(234304, 236000)),
    ("T", Mark(None, 4000), Mark(None, 7800)),
    ("T in the order given", Mark(2942, None), Mark(6729, None)),
    ("D1", Mark(4.93, 3.0), Mark(3.1, 2.3)),
    ("D32", Mark(20.6, 19.9), Mark(11.0, 11.0)),
    ("P 8192", Mark(50578, 52000), Mark(84089, 86000)),
    ("P 32768", Mark(28835, 28000), Mark(66530, 66000)),
    ("Ha", Mark(31.2, 24), Mark(28.7, 16)),
    ("Hb", Mark(1082, 1400), Mark(719, 2000)),
    ("K D32", Mark(None, 0.97), Mark(None, 0.97)),
)
MARKS: dict[str, dict[str, Mark]] = {
    "qwen3-30b-a3b": {name: mark for name, mark, _ in _MARKS},
    "qwen1.5-moe-a2.7b": {name: mark for name, _, mark in _MARKS},
    "deepseek-v2-lite": {
        "kv_tokens": Mark(1382096, 1400000),
        "T in the order given": Mark(8076, 9500),
        "D1": Mark(4.06, 2.3),
        "D32": Mark(13.1, 11.2),
        "P 8192": Mark(51087, 75000),
        "Ha": Mark(36.7, 15),
        "Hb": Mark(1297, 2100),
    },
}

USUAL = ("D1", "D32", "P", "Ha", "Hb", "T", "K")
"""The workloads that run unless others are named."""
NAMES = (*USUAL, "L128")
"""All, in the order they run."""


def parse_names(text: str) -> tuple[str, ...]:
    """Returns workload names from "T,D1"."""
    names = tuple(text.split(","))
    if not set(names) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(NAMES)}")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Equal requests that are there at once. `prompt` and `output` count tokens."""

    requests: int
    prompt: int
    output: int
    repeats: int

    @property
    def sizes(self) -> dict[str, int]:
        """As reports name them."""
        return {"batch": self.requests, "prompt": self.prompt, "output": self.output}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large every workload is. H asks `shared.prompt` new tokens after a cached `prefix`."""

    mixed: Batch
    """T: lengths are even in low..`prompt` and low..`output`."""
    mixed_low: int
    single: Batch
    batch: Batch
    prefills: tuple[int, ...]
    prefill_repeats: int
    prefix: int
    prefix_repeats: int
    shared: Batch
    document: int
    """Tokens that L128's requests, its `readers`, have before their own."""
    readers: Batch

    def within(self, length: int) -> Sizes:
        """Returns sizes whose longest request has at most `length` tokens (at least 64)."""

        def fit(batch: Batch, room: int) -> Batch:
            output = min(batch.output, max(room // 8, 2))
            return replace(batch, prompt=min(batch.prompt, room - output), output=output)

        shared = fit(self.shared, length // 2)
        mixed, readers = fit(self.mixed, length), fit(self.readers, length // 2)
        return replace(
            self,
            mixed=mixed,
            mixed_low=min(self.mixed_low, mixed.output // 2),
            single=fit(self.single, length),
            batch=fit(self.batch, length),
            prefills=tuple(dict.fromkeys(min(n, length - 1) for n in self.prefills)),
            prefix=min(self.prefix, (length - shared.prompt - shared.output) // 16 * 16),
            shared=shared,
            document=min(self.document, (length - readers.prompt - readers.output - 64) // 16 * 16),
            readers=readers,
        )


FULL = Sizes(
    mixed=Batch(requests=256, prompt=1024, output=1024, repeats=2),
    mixed_low=100,
    single=Batch(requests=1, prompt=512, output=256, repeats=5),
    batch=Batch(requests=32, prompt=1024, output=256, repeats=5),
    prefills=(8192, 32768),
    prefill_repeats=3,
    prefix=32768,
    prefix_repeats=5,
    shared=Batch(requests=32, prompt=64, output=64, repeats=3),
    document=122_880,
    readers=Batch(requests=32, prompt=8064, output=128, repeats=1),
)
QUICK = Sizes(
    mixed=Batch(requests=16, prompt=64, output=64, repeats=1),
    mixed_low=20,
    single=Batch(requests=1, prompt=64, output=8, repeats=1),
    batch=Batch(requests=8, prompt=128, output=8, repeats=1),
    prefills=(512, 2048),
    prefill_repeats=1,
    prefix=2048,
    prefix_repeats=2,
    shared=Batch(requests=8, prompt=64, output=8, repeats=2),
    document=1024,
    readers=Batch(requests=8, prompt=64, output=8, repeats=1),
)


def write_model(name: str, folder: Path, layers: int | None) -> None:
    """Writes the config.json of MODELS[name], cut to `layers` layers if given."""
    config = dict(MODELS[name].config)
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def engine_values(
    model: str, given: Mapping[str, Any], folder: Path, layers: int | None
) -> dict[str, Any]:
    """Returns the EngineConfig fields that run `model` under the options `given`.

    The shape of that name is written into `folder` and gets random weights; any other model is
    left to LLM. Raises ConfigError if `layers` is asked of one.
    """
    if model not in MODELS:
        if layers is not None:
            raise ConfigError(
                f"--layers cuts one of {', '.join(MODELS)}, not {model}; leave it out",
                field="layers",
            )
        return {"model": model, **given}
    write_model(model, folder, layers)
    shape = MODELS[model]
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": shape.max_model_len,
        **given,
    }


def fixed_prompts(vocab: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Returns `count` random prompts of one length."""
    rng = random.Random(seed)
    return [_prompt(rng, vocab, length) for _ in range(count)]


def mixed_requests(
    vocab: int, batch: Batch, low: int, seed: int
) -> tuple[list[list[int]], list[int]]:
    """Returns workload T: prompts and output lengths, even in low..prompt and low..output."""
    rng = random.Random(seed)
    inputs = [rng.randint(low, batch.prompt) for _ in range(batch.requests)]
    outputs = [rng.randint(low, batch.output) for _ in range(batch.requests)]
    return [_prompt(rng, vocab, n) for n in inputs], outputs


def _prompt(rng: random.Random, vocab: int, length: int) -> list[int]:
    """Evenly drawn ids, clear of the usual special ones at both ends if there are enough."""
    ids = range(200, vocab - 2000) if vocab > 4000 else range(vocab)
    return rng.choices(ids, k=length)
