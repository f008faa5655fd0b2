"""What must hold before any test module is imported, and a tiny model that can chat."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Triton decides at its import whether kernels are interpreted, and transformers imports it too.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Servers keep what clients leave with them in the user's data folder, where nobody tests.
_data_home = tempfile.TemporaryDirectory(prefix="octavo-test-data-")
os.environ["XDG_DATA_HOME"] = _data_home.name

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return dict(TINY_CONFIG)


def save_tiny_model(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return str(folder)


def save_tiny_chat_model(path: Path) -> str:
    """The same with a tokenizer, one token a byte, and a chat template."""
    folder = save_tiny_model(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {byte: 2 + i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    settings = {"eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A folder with nothing but a config: enough for plans and for dummy weights."""
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def tiny_chat_model(tmp_path: Path) -> str:
    return save_tiny_chat_model(tmp_path / "tiny")
