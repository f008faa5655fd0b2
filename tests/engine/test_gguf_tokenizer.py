"""Tokenizers of GGUF files: what they cut, know and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from octavo.engine.tokenizer import load_tokenizer
from octavo.errors import (
    ModelError,
    UnsupportedModelError,
    WeightsError,
)
from octavo.weights.gguf_pretokenizers import PRE_TOKENIZERS
from octavo.weights.gguf_tokenizer import byte_spelling, tokenizer_files_from_gguf
from tests.engine.texts import random_texts


def write_gguf(path: Path, **values: Any) -> Path:
    """Writes a byte-level vocabulary of the 256 bytes and a few tokens more."""
    tokens = [*byte_spelling(), "th", "the", "<|end|>", "<think>", "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values.get("model", "gpt2"))
    if "pre" in values:
        writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 4, 1])
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


SINGLE_DIGITS = {
    *("smollm", "starcoder", "refact", "command-r", "tekken", "deepseek-llm", "deepseek-coder")
}


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_known_pre_tokenizer_encodes_and_decodes_any_text(tmp_path, pre):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre))
    for text in random_texts(30, seed=4):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not PRE_TOKENIZERS[pre].nfc:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.tokens(tokenizer.encode("the<|end|><think>", add_special_tokens=False)) == [
        "the",
        "<|end|>",
        "<think>",
    ]
    is_split = pre in SINGLE_DIGITS or "qwen" in pre
    assert (257 + 3 in tokenizer.encode("12", add_special_tokens=False)) is not is_split
    assert (tokenizer.encode("the")[0] == 258) is PRE_TOKENIZERS[pre].add_bos
    assert tokenizer.is_special(258)
    assert not tokenizer.is_special(259)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("tekken", ["We", "'ll", " See", "4", "5", "6", "7", "HTTPServer", "'s"]),
        ("glm4", ["We", "'ll", " See", "456", "7", "HTTPServer", "'s"]),
        ("gpt-4o", ["We'll", " See", "456", "7", "HTTPServer's"]),
        ("glm4", ["We", "'ll", " See", "456", "7", "HTTPServer", "'s", " \u4e2d\u6587ab"]),
        ("kimi-k2", ["We'll", " See", "456", "7", "HTTPServer's", "\u4e2d\u6587", "ab", ".go"]),
        ("deepseek-v3", ["We", "'ll", " See", "456", "7", "\u4e2d\u6587", "ab", ".go", "(\n"]),
        (
            "deepseek-llm",
            ["We", "'", "ll", " See", "4", "5", "\n", "\u4e2d\u6587", "ab", ".", "  "],
        ),
        ("deepseek-llm", ["na", "\u00ef", "ve", " \u0391\u03b2", "\u05d0"]),
        ("deepseek-coder", ["na\u00efve", " \u05d0", "4", "5", "(", "\n", "\u4e2d\u6587"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_cuts_it(
    tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    files = tokenizer_files_from_gguf(write_gguf(tmp_path / "m.gguf", pre=pre))
    core = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert core.pre_tokenizer is not None
    text = "".join(pieces)
    spans = [span for _, span in core.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in spans] == pieces


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pre": "strange"}, "'strange' is unknown; known are default"),
        ({"model": "bert"}, "'bert'"),
    ],
)
def test_unknown_gguf_tokenizers_are_refused_with_what_is_known(tmp_path, values, message):
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer_files_from_gguf(write_gguf(tmp_path / "m.gguf", **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.0]}, r"scores has 1 entries for 6 tokens"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries for 6 tokens"),
        ({"tokens": [1, 2, 3, 4, 5, 6]}, r"tokens must be a list"),
        ({"model": "gpt2", "merges": None}, r"tokenizer\.ggml\.merges is missing"),
    ],
)
def test_a_vocabulary_with_a_part_missing_is_refused_by_its_key(tmp_path, change, message):
    path = write_vocabulary(tmp_path / "m.gguf", **change)
    with pytest.raises(WeightsError, match=message):
        load_tokenizer(path)


def test_what_a_sentencepiece_gguf_leaves_out_is_as_llama_cpp_takes_it(tmp_path):
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "m.gguf", token_type=None))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    assert tokenizer.encode("a") == [1, 3]
    assert tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize("key", ["bos", "eos", "unknown"])
def test_an_id_beyond_the_vocabulary_counts_as_absent(tmp_path, key):
    path = write_vocabulary(tmp_path / "m.gguf", **{f"{key}_token_id": 2**32 - 1})
    assert load_tokenizer(path).encode("a") == [1, 3]


def write_vocabulary(path: Path, **changes: Any) -> Path:
    """Writes the least SentencePiece vocabulary, changed (None leaves a key out)."""
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": ["?", "<s>", "</s>", "\u2581a", "\u2581", "a"],
        "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
        "token_type": [2, 3, 3, 1, 1, 1],
        "add_space_prefix": True,
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_turn_ends_with_a_control_token_even_if_the_file_has_it_as_text(tmp_path):
    tokens = ["?", "<s>", "</s>", "\u2581a", "\u2581", "a", "<|im_end|>"]
    changes = {"tokens": tokens, "scores": [0.0] * 7, "token_type": [2, 3, 3, 1, 1, 1, 1]}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "m.gguf", **changes))
    assert tokenizer.is_special(6)
    assert tokenizer.encode("a<|im_end|>") == [1, 3, 6]


def test_a_truncated_gguf_is_a_clear_error_wherever_it_ends(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    for length in (0, 3, 20, 100, len(whole) // 2):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"broken\.gguf"):
            tokenizer_files_from_gguf(broken)
    with pytest.raises(ModelError, match="does not exist"):
        tokenizer_files_from_gguf(tmp_path / "none.gguf")
