"""Tokens in log-probabilities: told apart by their ids, their bytes real, their places right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from octavo.engine.detokenizer import Detokenizer
from octavo.engine.tokenizer import Tokenizer
from octavo.request import Logprob, PositionLogprobs, SamplingParams
from octavo.server.logprobs import (
    CompletionLogprobs,
    TokenSpelling,
    chat_logprobs,
    prompt_logprobs,
)
from octavo.server.pieces import pieces_of
from tests.server.tiny_engine import write_model

ASTRONAUT = "\U0001f600"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def piece_tokenizer() -> Tokenizer:
    """SentencePiece's way: a sign for spaces, bytes as pieces of their own, a leading space."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581a", "b", "\u2581", "c"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.add_special_tokens(["<unk>", "<s>"])
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core.to_str(), {"bos_token": "<s>"})


def position(*token_ids: int) -> PositionLogprobs:
    return tuple(Logprob(token_id=t, logprob=-0.5 - i) for i, t in enumerate(token_ids))


def plain(value: object) -> Any:
    """Returns what a client reads of `value`."""
    return json.loads(b"".join(pieces_of(value)))


def written(
    tokenizer: Tokenizer, positions: Sequence[PositionLogprobs], num_top: int = 5
) -> dict[str, list]:
    writer = CompletionLogprobs(TokenSpelling(tokenizer), num_top, True)
    return plain(writer.write(positions))


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [ids[bytes([byte])] for byte in raw]


def test_parts_of_characters_are_written_as_their_bytes(byte_tokenizer: Tokenizer) -> None:
    first, second, *_ = byte_ids(byte_tokenizer, ASTRONAUT.encode())
    found = written(byte_tokenizer, [position(first, second)])
    assert found["tokens"] == ["bytes:\\xf0"]
    assert found["top_logprobs"] == [{"bytes:\\xf0": -0.5, "bytes:\\x9f": -1.5}]


def test_tokens_of_equal_text_keep_their_own_chances(piece_tokenizer: Tokenizer) -> None:
    letter = piece_tokenizer.encode("b", False)[0]
    [byte] = [i for i, t in enumerate(piece_tokenizer.tokens(range(260))) if t == "<0x62>"]
    found = written(piece_tokenizer, [position(letter, byte), position(byte, letter)])
    assert found["tokens"] == ["b", "b"]
    assert found["top_logprobs"] == [
        {"b": -0.5, f"token_id:{byte}": -1.5},
        {"b": -0.5, f"token_id:{letter}": -1.5},
    ]


def test_the_drawn_token_is_reported_once_and_before_the_most_likely(
    byte_tokenizer: Tokenizer,
) -> None:
    [a, b, c] = byte_ids(byte_tokenizer, b"abc")
    twice = (*position(a, b), Logprob(token_id=a, logprob=-0.5), *position(c))
    assert list(written(byte_tokenizer, [twice], num_top=2)["top_logprobs"][0]) == ["a", "b"]
    assert list(written(byte_tokenizer, [twice], num_top=0)["top_logprobs"][0]) == ["a"]


def test_what_is_impossible_is_a_number(byte_tokenizer: Tokenizer) -> None:
    never = (Logprob(token_id=5, logprob=float("-inf")),)
    found = written(byte_tokenizer, [never])
    assert found["token_logprobs"] == [-9999.0]
    json.dumps(found, allow_nan=False)


def test_tokens_are_written_as_ids_on_request(byte_tokenizer: Tokenizer) -> None:
    spelling = TokenSpelling(byte_tokenizer, as_ids=True)
    found = plain(CompletionLogprobs(spelling, 1, True).write([position(7, 8)]))
    assert found["tokens"] == ["token_id:7"]
    assert found["top_logprobs"] == [{"token_id:7": -0.5, "token_id:8": -1.5}]
    [entry] = plain(chat_logprobs([position(7, 8)], 1, spelling))["content"]
    assert entry["token"] == "token_id:7"
    assert bytes(entry["bytes"]) == byte_tokenizer.token_bytes(7)


def test_the_bytes_of_a_chat_make_up_its_text(byte_tokenizer: Tokenizer) -> None:
    ids = byte_ids(byte_tokenizer, ASTRONAUT.encode())
    spelling = TokenSpelling(byte_tokenizer)
    content = plain(chat_logprobs([position(i) for i in ids], 0, spelling))["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == ASTRONAUT
    assert content[0]["token"] == "bytes:\\xf0"


def test_each_part_of_a_character_has_the_characters_place(byte_tokenizer: Tokenizer) -> None:
    ids = byte_ids(byte_tokenizer, f"a{ASTRONAUT}b".encode())
    found = written(byte_tokenizer, [position(i) for i in ids])
    assert found["text_offset"] == [0, 1, 1, 1, 1, 2]


def test_a_token_after_half_a_character_has_its_own_place(byte_tokenizer: Tokenizer) -> None:
    ids = byte_ids(byte_tokenizer, b"\xf0#")
    assert written(byte_tokenizer, [position(i) for i in ids])["text_offset"] == [0, 1]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_places_are_those_of_the_text_that_is_returned(
    kind: str, data: st.DataObject, skip: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    writer = CompletionLogprobs(TokenSpelling(tokenizer), 0, skip)
    cut = data.draw(st.integers(0, len(ids)))
    places = [
        place
        for part in (ids[:cut], ids[cut:])
        for place in plain(writer.write([position(i) for i in part]))["text_offset"]
    ]
    detokenizer, text = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip)), ""
    for token_id, place in zip(ids, places, strict=True):
        new = detokenizer.update([token_id]).text
        own = tokenizer.token_bytes(token_id).decode("utf-8", "ignore")
        # A character that nothing goes on with is written when the next token comes.
        late = len(new) - len(own) if own and new.endswith(own) else 0
        assert place == len(text) + late
        text += new


@pytest.mark.parametrize(
    "prompt", ["Once upon", f"a {ASTRONAUT}!", "<|im_start|>Once<|im_end|>", "", "\u00e9\u00e9"]
)
def test_an_echoed_prompt_has_its_places_before_the_answers(
    byte_tokenizer: Tokenizer, prompt: str
) -> None:
    [end] = byte_tokenizer.encode("<|endoftext|>", False)
    ids = [end, *byte_tokenizer.encode(prompt, False)]  # The first stands for a BOS.
    writer = CompletionLogprobs(TokenSpelling(byte_tokenizer), 0, True)
    writer.echo(prompt, ids, [None, *(position(i) for i in ids[1:])])
    [answer] = byte_ids(byte_tokenizer, b"x")
    found = plain(writer.write([position(answer)]))
    assert found["tokens"][0] == "<|endoftext|>"
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["text_offset"][0] == 0
    assert found["text_offset"][-1] == len(prompt)
    for token, place in zip(found["tokens"][1:-1], found["text_offset"][1:-1], strict=True):
        assert token.startswith("bytes:") or prompt.startswith(token, place)
    assert plain(writer.write([position(answer)]))["text_offset"] == [len(prompt) + 1]


def test_prompt_tokens_are_keyed_by_their_ids(byte_tokenizer: Tokenizer) -> None:
    [a, b, c] = byte_ids(byte_tokenizer, b"ab\xff")
    assert prompt_logprobs(None, 1, byte_tokenizer) is None
    found = plain(prompt_logprobs([None, position(a, b, c)], 1, byte_tokenizer))
    assert found is not None
    assert found[0] is None
    assert found[1] is not None
    assert list(found[1]) == [str(a), str(b)]
    assert found[1][str(a)] == {"logprob": -0.5, "rank": None, "decoded_token": "a"}


def test_tokens_keep_their_identity_over_http(http: httpx.Client) -> None:
    body = {"prompt": f"a {ASTRONAUT}b", "max_tokens": 3, "logprobs": 3, "echo": True}
    found = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    rows = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    for token, own, top in list(rows)[1:]:
        assert top[token] == own
        assert len(top) >= 3


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_told_as_ids_over_http(http: httpx.Client, stream: bool) -> None:
    body = {"max_tokens": 3, "ignore_eos": True, "return_token_ids": True, "stream": stream}
    body |= {"return_tokens_as_token_ids": True}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    for path, more in (
        ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        ("/v1/chat/completions", chat),
    ):
        text = http.post(path, json={**body, **more}).text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        choices = [
            choice
            for event in events
            if event != "[DONE]"
            for choice in json.loads(event)["choices"]
        ]
        ids = [token_id for choice in choices for token_id in choice.get("token_ids") or ()]
        told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        tokens = [
            token
            for one in told
            for token in one.get("tokens") or [entry["token"] for entry in one["content"]]
        ]
        assert tokens == [f"token_id:{token_id}" for token_id in ids]
        assert len(tokens) == 3
