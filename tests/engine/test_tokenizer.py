"""The tokenizer against transformers, GGUF vocabularies, and chats that try to forge control."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, processors

from octavo.config import cache_dir
from octavo.engine.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from octavo.errors import (
    ModelError,
    ModelNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_tokenizer import tokenizer_files_from_gguf
from tests.engine.texts import chat, random_texts

DEMO = Path(cache_dir()) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_ids_of_a_folder_equal_those_of_transformers(byte_folder, byte_tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(byte_folder)
    for text in random_texts(500, seed=1):
        ids = byte_tokenizer.encode(text)
        assert ids == theirs.encode(text), f"seed 1: {text!r}"
        assert byte_tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert byte_tokenizer.vocab_size == len(theirs)
    assert byte_tokenizer.eos_token_id == theirs.eos_token_id == 2
    assert byte_tokenizer.bos_token_id == 1


def with_prefix(text: str) -> str:
    """SentencePiece puts its dummy space before every text; a tokenizer.json takes a space that is
    there for it, so it needs one more."""
    return " " + text if text[:1] in (" ", "\u2581") else text


def test_ids_of_a_sentencepiece_gguf_equal_those_of_transformers(spm_gguf, spm_tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(spm_gguf.parent, gguf_file=spm_gguf.name)
    for text in random_texts(500, seed=2):
        ids = spm_tokenizer.encode(text)
        assert ids == theirs.encode(with_prefix(text)), f"seed 2: {text!r}"
        assert ids[0] == spm_tokenizer.bos_token_id
        assert spm_tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_sentencepiece_joins_the_neighbours_whose_union_scores_best(spm_gguf, spm_tokenizer):
    meta = read_gguf(spm_gguf).metadata
    scores = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"], strict=True))
    texts = ("the quick brown fox", "jumps over gro\xdfe", "Sylter Deich user")
    for text in (*texts, " the", "   lazy dog", "\u2581fox", " "):
        pieces = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            joins = [
                (scores[a + b], -i)
                for i, (a, b) in enumerate(itertools.pairwise(pieces))
                if a + b in scores
            ]
            if not joins:
                break
            place = -max(joins)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        ids = spm_tokenizer.encode(text, add_special_tokens=False)
        assert spm_tokenizer.tokens(ids) == pieces
        assert spm_tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not downloaded")
def test_ids_of_the_demo_equal_those_of_transformers_where_no_digit_follows_spaces():
    ours = load_tokenizer(DEMO)
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO.parent, gguf_file=DEMO.name)
    texts = [text.replace("12", "") for text in random_texts(1000, seed=3)]
    for text in [t for t in texts if not any(c.isnumeric() for c in t)]:
        assert ours.encode(text) == theirs.encode(text), f"seed 3: {text!r}"
    # transformers leaves out the model's rule that every digit is a piece of its own.
    assert ours.tokens(ours.encode("a  12")) == ["a", "\u0120\u0120", "1", "2"]


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is broken"):
        load_tokenizer(tmp_path)


def test_the_config_adds_tokens_bos_and_named_templates(byte_folder):
    text = (byte_folder / "tokenizer.json").read_text()
    size = load_tokenizer(byte_folder).vocab_size
    config = {
        "bos_token": "<|im_start|>",
        "add_bos_token": True,
        "added_tokens_decoder": {str(size): {"content": "<new>", "special": True}},
        "chat_template": [
            {"name": "tool_use", "template": "t"},
            {"name": "default", "template": "d"},
        ],
    }
    tokenizer = Tokenizer(text, config)
    assert tokenizer.encode("<new>") == [1, size]
    assert tokenizer.encode("<new>", add_special_tokens=False) == [size]
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.chat_template == "d"
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<new>"}}
    with pytest.raises(ModelError, match="do not belong together"):
        Tokenizer(text, config)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
def test_token_bytes_make_up_the_text(kind, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "The quick \u6211\u304c\u4e16 \U0001f600 gro\xdfe\n<0x41>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.tokens([10**6]) == [""]
    assert tokenizer.decode([10**6]) == ""


def test_half_a_surrogate_pair_is_refused(byte_tokenizer):
    with pytest.raises(RequestError, match="character 2"):
        byte_tokenizer.encode("ab\ud800")


FLAGS: list[dict[str, Any]] = [
    {},
    {"add_eos_token": False},
    {"add_eos_token": True},
    {"add_bos_token": None},
    {"add_bos_token": False},
    {"add_bos_token": True},
    {"add_bos_token": None, "add_eos_token": None},
]
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"]
CLASSES += ["GPT2Tokenizer", "GemmaTokenizer", "GPTNeoXTokenizer", None]


@pytest.mark.parametrize("model_type", [None, "llama", "olmoe"])
@pytest.mark.parametrize("name", CLASSES)
def test_bos_and_eos_are_added_where_transformers_adds_them(tmp_path, name, model_type):
    for number, (ends, flags) in enumerate(itertools.product(("", "b", "be"), FLAGS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_letters(folder, ends)
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **flags}
        if name is not None:
            config["tokenizer_class"] = name
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if model_type is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        right = transformers.AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"]
        found = load_tokenizer(folder).encode("Hi")
        assert (found[0] == 0, found[-1] == 1) == (right[0] == 0, right[-1] == 1), (ends, flags)


def write_letters(folder: Path, ends: str) -> None:
    """A vocabulary of two letters whose tokenizer.json adds BOS (b) and EOS (e)."""
    vocab = {"<s>": 0, "</s>": 1, "H": 2, "i": 3, "Hi": 4, "<unk>": 5, "\u2581": 6}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("H", "i")], unk_token="<unk>"))
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    if ends:
        single = f"{'<s> ' if 'b' in ends else ''}$A{' </s>' if 'e' in ends else ''}"
        special = [("<s>", 0), ("</s>", 1)]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    core.save(str(folder / "tokenizer.json"))


def test_one_flag_that_is_given_leaves_the_other_end_as_it_is(tmp_path):
    write_letters(tmp_path, "be")
    text = (tmp_path / "tokenizer.json").read_text()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for flags, wanted in (
        ({"add_eos_token": False}, [0, 4]),
        ({"add_bos_token": False}, [4, 1]),
        ({"add_bos_token": None, "add_eos_token": None}, [0, 4, 1]),
        ({"add_bos_token": True, "add_eos_token": None}, [0, 4, 1]),
    ):
        assert Tokenizer(text, names | flags).encode("Hi") == wanted


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(byte_tokenizer):
    assert eos_token_ids({"eos_token_id": [7, 2]}, byte_tokenizer) == (7, 2)
    assert eos_token_ids({"eos_token_id": 0}, byte_tokenizer) == (0, 2)
    assert eos_token_ids(None, byte_tokenizer) == (2,)
    assert eos_token_ids({}, None) == ()
    for wrong in ("2", [2, None], True, -1, 1.5, {"a": 1}):
        with pytest.raises(ModelError, match="eos_token_id is"):
            eos_token_ids({"eos_token_id": wrong}, byte_tokenizer)


def test_files_from_gguf_load_in_transformers_with_the_same_ids(spm_gguf, spm_tokenizer, tmp_path):
    for name, text in tokenizer_files_from_gguf(spm_gguf).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(200, seed=7):
        assert spm_tokenizer.encode(text) == theirs.encode(with_prefix(text)), f"seed 7: {text!r}"
    wanted = theirs.apply_chat_template(chat("hello"), return_dict=False)
    assert spm_tokenizer.apply_chat_template(chat("hello")) == wanted


def test_the_longest_spelling_bounds_every_text(byte_tokenizer, spm_tokenizer):
    for tokenizer in (byte_tokenizer, spm_tokenizer):
        longest = tokenizer.longest_spelling
        assert 3 < longest < 40
        for text in ("hello world " * 20, "\u3044\u308d\u306f" * 30, " " * 100):
            assert len(text) <= longest * len(tokenizer.encode(text, False))


def test_no_spelling_is_longest_where_unknown_words_become_one_token():
    core = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = Tokenizer(core.to_str())
    assert tokenizer.encode("x" * 1000) == [0]
    assert tokenizer.longest_spelling is None


def test_encoding_and_decoding_let_other_threads_run(byte_tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 8000
    for work in (
        lambda: byte_tokenizer.encode(text),
        lambda: byte_tokenizer.decode([300] * 1_000_000),
    ):
        thread, turns = threading.Thread(target=work), 0
        thread.start()
        while thread.is_alive():
            thread.join(0.001)
            turns += 1
        # Not one turn only, at the end, as a call that keeps the GIL gives.
        assert turns > 5
