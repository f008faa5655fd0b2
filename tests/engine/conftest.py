"""Two small tokenizers that need no download: byte-level BPE, and SentencePiece from GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from octavo.engine.tokenizer import Tokenizer, load_tokenizer

CORPUS = (
    "The quick brown fox jumps over the lazy dog. im_start im_end user system assistant\n"
    "Zw\xf6lf gro\xdfe Boxk\xe4mpfer jagen Viktor quer \xfcber den Sylter Deich.  12 345 6789\n"
    "\u3044\u308d\u306f\u306b\u307b\u3078\u3068"
    " \u3061\u308a\u306c\u308b\u3092"
    " \u6211\u304c\u4e16\u8ab0\u305e \u5e38\u306a\u3089\u3080\n"
    "emoji: \U0001f600 \U0001f603"
    " \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea don't we'll\n"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_byte_level_folder(folder: Path) -> Path:
    """Trains a byte-level BPE tokenizer and writes its files."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([CORPUS], trainer)
    core.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    core.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def write_sentencepiece_gguf(path: Path) -> Path:
    """Writes a GGUF file with a SentencePiece vocabulary: bytes, and pieces of the corpus."""
    pieces: dict[str, None] = {}
    for length in (1, 2, 3, 5):
        for word in CORPUS.split():
            word = "\u2581" + word
            pieces.update((word[i : i + length], None) for i in range(len(word) - length + 1))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(len(piece) * 7919 % 1009) for piece in pieces]
    scores[259:] = [score - i * 1e-3 for i, score in enumerate(scores[259:])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level_folder(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def spm_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece_gguf(tmp_path_factory.mktemp("spm") / "spm.gguf")


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_folder)


@pytest.fixture(scope="session")
def spm_tokenizer(spm_gguf: Path) -> Tokenizer:
    return load_tokenizer(spm_gguf)
