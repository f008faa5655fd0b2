"""What may enter the engine, and with which words everything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from octavo.engine.input_processor import InputProcessor
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ContextLengthError, RequestError
from octavo.request import SamplingParams


@pytest.fixture
def processor(byte_tokenizer) -> InputProcessor:
    return InputProcessor(byte_tokenizer, max_model_len=32, vocab_size=800, eos_token_ids=[2, 0])


def process(processor: InputProcessor, prompt: Any, **params: Any):
    return processor.process("r", prompt, SamplingParams(**params))


def test_text_and_ids_become_the_same_request(processor, byte_tokenizer):
    ids = byte_tokenizer.encode("The quick fox")
    by_text, by_ids = process(processor, "The quick fox"), process(processor, ids)
    assert by_text == by_ids
    assert by_text.prompt_token_ids == ids
    assert by_text.eos_token_ids == (2, 0)


def test_what_comes_with_a_request_is_kept(processor):
    request = processor.process(
        "id", [5], SamplingParams(seed=3), priority=-1, cache_salt="tenant", arrival_time=9.5
    )
    assert (request.request_id, request.priority) == ("id", -1)
    assert (request.cache_salt, request.arrival_time, request.params.seed) == ("tenant", 9.5, 3)


def test_no_max_tokens_means_the_rest_of_the_context(processor):
    assert process(processor, [1] * 20, max_tokens=None).params.max_tokens == 12
    assert process(processor, [1] * 31, max_tokens=None).params.max_tokens == 1
    assert process(processor, [1] * 30, max_tokens=2).params.max_tokens == 2


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [
        (33, None, ["33 tokens", "holds 32"]),
        (32, 1, ["32 tokens", "holds 32", "shorten the prompt"]),
        (30, 3, ["30 tokens", "max_tokens is 3", "holds 32", "at most 2"]),
    ],
)
def test_lengths_that_do_not_fit_name_all_numbers(processor, length, max_tokens, words):
    with pytest.raises(ContextLengthError) as caught:
        process(processor, [1] * length, max_tokens=max_tokens)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ("", {}, "prompt", "empty"),
        ([], {}, "prompt", "empty"),
        ([1, 800], {}, "prompt", "id 800 at position 1.*800 tokens"),
        ([-1], {}, "prompt", "-1"),
        ([1.5], {}, "prompt", r"1\.5 at position 0"),
        ([True], {}, "prompt", "integers"),
        ([1], {"stop_token_ids": [900]}, "stop_token_ids", "900"),
        ([1], {"allowed_token_ids": [800]}, "allowed_token_ids", "800"),
        ([1], {"logit_bias": {801: 1.0}}, "logit_bias", "801"),
        ([1], {"bad_words_token_ids": [[1, 802]]}, "bad_words_token_ids", "802"),
        ([1], {"bad_words_token_ids": [[]]}, "bad_words_token_ids", "empty"),
        ([1], {"stop": ["x"], "detokenize": False}, "stop", "detokenize"),
        ([1], {"max_tokens": None, "min_tokens": 32}, "min_tokens", "at most max_tokens"),
    ],
)
def test_bad_input_is_refused_with_its_field(processor, prompt, params, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        process(processor, prompt, **params)
    assert caught.value.param == param


def test_bad_words_are_banned_with_and_without_a_space(processor, byte_tokenizer):
    params = process(processor, [1], bad_words=["quick"], bad_words_token_ids=[[7]]).params
    spellings = [byte_tokenizer.encode(text) for text in ("quick", " quick")]
    assert params.bad_words_token_ids == ((7,), *map(tuple, spellings))


def spelled(tokenizer: Tokenizer, words: list[str]) -> list[str]:
    """What the ids write that are banned for `words`."""
    processor = InputProcessor(tokenizer, max_model_len=32, vocab_size=5000)
    banned = process(processor, [1], bad_words=words).params.bad_words_token_ids
    return [b"".join(map(tokenizer.token_bytes, ids)).decode() for ids in banned]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
@pytest.mark.parametrize(
    "word", ["quick", " quick", "\n", "\n\n", "\t", " ", "  ", " \n", "\nfox", "x ", "\u2003"]
)
def test_what_is_banned_writes_the_bad_word_and_nothing_but_spaces_before_it(kind, word, request):
    texts = spelled(request.getfixturevalue(kind), [word])
    stem = word if word.isspace() else word.lstrip(" ")
    assert stem in texts
    assert all(text.endswith(stem) and not text.removesuffix(stem).strip() for text in texts)


def test_a_sentencepiece_bad_word_is_banned_within_a_text_too(spm_tokenizer):
    assert sorted(set(spelled(spm_tokenizer, ["quick"]))) == [" quick", "quick"]
    assert "\n" in spelled(spm_tokenizer, ["\n"])


def test_a_bad_word_that_the_tokenizer_cannot_write_is_refused():
    core = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "fox": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["[UNK]"])
    tokenizer = Tokenizer(core.to_str())
    assert spelled(tokenizer, ["fox"]) == ["fox"]
    for word in ("\n", " ", "dog"):
        with pytest.raises(RequestError, match="cannot write") as caught:
            spelled(tokenizer, [word])
        assert caught.value.param == "bad_words"


def test_without_a_tokenizer_ids_go_in_and_text_is_refused():
    processor = InputProcessor(None, max_model_len=32, vocab_size=800)
    assert process(processor, [1, 2]).prompt_token_ids == [1, 2]
    for prompt, params in (("text", {}), ([1], {"stop": "x"}), ([1], {"bad_words": ["x"]})):
        with pytest.raises(RequestError, match="without one"):
            process(processor, prompt, **params)
