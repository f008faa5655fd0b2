"""Prompts of every type that Python users give: read, or refused with what is wanted."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from octavo.engine.prompts import read_prompt, read_prompts
from octavo.errors import RequestError


def contents(prompts: Any) -> list[str | Sequence[int]]:
    return [prompt.content for prompt in read_prompts(prompts)]


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.uint16),
        [np.int64(1), np.int64(2), np.int64(3)],
        torch.tensor([1, 2, 3]),
        list(torch.tensor([1, 2, 3])),
        array("i", [1, 2, 3]),
        (one for one in (1, 2, 3)),
        {"prompt_token_ids": np.array([1, 2, 3])},
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_flat_ids_of_any_type_are_one_prompt(ids: Any):
    (content,) = contents(ids)
    assert [int(one) for one in content] == [1, 2, 3]


@pytest.mark.parametrize(
    "prompts",
    [
        ["a", "b"],
        ("a", "b"),
        (one for one in "ab"),
        map(str, ["a", "b"]),
        {"x": "a", "y": "b"}.values(),
        np.array(["a", "b"]),
        [{"prompt": "a"}, {"prompt": "b", "multi_modal_data": None}],
    ],
)
def test_several_texts_of_any_type_are_several_prompts(prompts: Any):
    assert contents(prompts) == ["a", "b"]


def test_rows_of_ids_are_several_prompts():
    rows = [[1, 2], [3, 4]]
    for given in (rows, np.array(rows), torch.tensor(rows), [np.array([1, 2]), (3, 4)]):
        assert [list(content) for content in contents(given)] == rows
    assert contents([]) == contents(iter(())) == []


def test_a_prompt_may_bring_its_salt_and_the_text_of_its_ids():
    (given,) = read_prompts({"prompt_token_ids": [1], "prompt": "a", "cache_salt": "s"})
    assert (given.content, given.cache_salt) == ([1], "s")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, "prompts must be text, token ids, or a mapping .*, got int"),
        (None, "got NoneType"),
        (b"abc", "got bytes"),
        ({1, 2}, "got set"),
        (np.array(5), "got ndarray"),
        (["a", 1], r"prompts\[1\] must be text, token ids, .*, got int"),
        ([["a"], b"x"], r"prompts\[1\] must be .*, got bytes"),
        ([1.5, 2], r"prompts\[0\] must be .*, got float"),
        ({}, "prompt must have prompt .*; it has neither"),
        ({"prompt": 5}, "got 5"),
        ({"prompt_token_ids": 5}, "prompt.prompt_token_ids must be"),
        ({"prompt": "a", "mood": 1}, "unknown field 'mood'; use prompt,"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "multi_modal_data is not supported"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt must be text"),
    ],
)
def test_what_is_no_prompt_is_refused_by_place(prompts: Any, words: str):
    with pytest.raises(RequestError, match=words):
        read_prompts(prompts)


def test_one_prompt_of_many_is_not_taken_for_one():
    with pytest.raises(RequestError, match="got int"):
        read_prompt(5)
