"""A real engine that starts in seconds: a tiny Mixtral of random weights, a trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig

TEMPLATE = (
    "{% if messages[-1].role == 'system' %}{{ raise_exception('who asks?') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "sliding_window": None,
}


def write_model(folder: Path) -> Path:
    """Writes config and tokenizer; the weights are made at load."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Once upon a time there was a hello world, and it counted."], trainer)
    core.save(str(folder / "tokenizer.json"))
    tokenizer = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def tiny_engine(
    folder: Path, max_model_len: int = 512, chat_template: str | None = None
) -> AsyncLLM:
    """Returns an engine, not started yet."""
    return AsyncLLM(
        EngineConfig(
            model=str(write_model(folder)),
            load_format="dummy",
            dtype="float32",
            device="cpu",
            max_model_len=max_model_len,
            chat_template=chat_template,
            kv_cache_memory_bytes=64 * 2**20,
            num_threads=1,
        ),
        log_level="warning",
    )


def engine_of(folder: Path, told: dict[str, Any], max_model_len: int, **options: Any) -> AsyncLLM:
    """A Mixtral of dummy weights whose config.json has the fields of `told`, too."""
    write_model(folder)
    config = json.loads((folder / "config.json").read_text()) | told
    (folder / "config.json").write_text(json.dumps(config))
    return AsyncLLM(
        EngineConfig(
            model=str(folder),
            load_format="dummy",
            dtype="float32",
            max_model_len=max_model_len,
            max_num_seqs=8,
            kv_cache_memory_bytes=2**21,
            num_threads=1,
            **options,
        )
    )
