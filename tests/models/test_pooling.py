"""Vectors and scores of tiny random checkpoints equal those that transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from octavo import LLM, ModelError, PoolingParams, RequestError, UnsupportedModelError
from tests.models.tiny import save_tiny

TOLERANCE = 1e-4
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
POOLINGS: dict[str, dict[str, Any]] = {
    "last": {"pooling_mode_lasttoken": True, "include_prompt": True},
    "mean": MEAN,
    "cls": {"pooling_mode": "cls"},
}
PROMPT_LENS = (40, 1, 17, 90, 33)


def save(case: str, folder: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    """Saves a tiny random model and returns it."""
    return save_tiny(case, folder, auto=auto, **more).reference


def write_modules(folder: Path, *modules: tuple[str, dict[str, Any]]) -> None:
    """Writes what sentence-transformers does."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.Transformer"}]
    for place, (kind, config) in enumerate(modules, start=1):
        path = f"{place}_{kind}"
        name = f"sentence_transformers.models.{kind}"
        entries.append({"idx": place, "name": str(place), "path": path, "type": name})
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(entries))


def open_llm(folder: Path, **more: Any) -> LLM:
    options = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "kv_cache_memory_bytes": 2**21,
        "poison_freed_blocks": True,
        "num_threads": 1,
        **more,
    }
    return LLM(str(folder), **options)


def prompts(seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 211, length).tolist() for length in PROMPT_LENS]


def pooled(states_TM: torch.Tensor, reads: str) -> np.ndarray:
    found = {"last": states_TM[-1], "mean": states_TM.mean(0), "cls": states_TM[0]}[reads]
    return found.numpy()


def hidden_states(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.base_model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("reads", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_what_the_modules_say(reads: str, normalize: bool, tmp_path: Path) -> None:
    model = save("qwen3", tmp_path)
    modules = [("Pooling", POOLINGS[reads]), *([("Normalize", {})] if normalize else [])]
    write_modules(tmp_path, *modules)
    llm = open_llm(tmp_path)
    found = []
    try:
        for _ in range(2):  # the second time from what is cached, where that can be
            found = llm.embed(prompts(), use_tqdm=False)
            for output, ids in zip(found, prompts(), strict=True):
                expected = pooled(hidden_states(model, ids), reads)
                if normalize:
                    expected = expected / np.linalg.norm(expected)
                np.testing.assert_allclose(output.outputs.embedding, expected, atol=TOLERANCE)
                assert output.prompt_token_ids == ids
        cached = [output.num_cached_tokens for output in found]
        assert cached == ([32, 0, 16, 80, 32] if reads == "last" else [0] * 5)
        raw = llm.embed(prompts()[0], pooling_params=PoolingParams(use_activation=False))
        expected = pooled(hidden_states(model, prompts()[0]), reads)
        np.testing.assert_allclose(raw[0].outputs.embedding, expected, atol=TOLERANCE)
    finally:
        llm.close()


@pytest.mark.parametrize("reads", POOLINGS)
def test_neighbours_chunks_and_hits_change_no_bit(reads: str, tmp_path: Path) -> None:
    save("qwen3-moe", tmp_path)
    write_modules(tmp_path, ("Pooling", POOLINGS[reads]), ("Normalize", {}))
    found = []
    for chunk in (7, 128):
        llm = open_llm(tmp_path, max_num_batched_tokens=chunk, deterministic=True)
        try:
            together = llm.embed(prompts(), use_tqdm=False)
            again = llm.embed(prompts(), use_tqdm=False)
            alone = [llm.embed(ids, use_tqdm=False)[0] for ids in prompts()]
            found += [[one.outputs.embedding for one in each] for each in (together, again, alone)]
        finally:
            llm.close()
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "qwen2-moe"])
def test_a_model_without_a_head_is_an_embedding_model(case: str, tmp_path: Path) -> None:
    """Its tensors are named without `model.`, as in Qwen3-Embedding."""
    model = save(case, tmp_path, AutoModel)
    llm = open_llm(tmp_path)
    try:
        for output, ids in zip(llm.embed(prompts(), use_tqdm=False), prompts(), strict=True):
            expected = hidden_states(model, ids)[-1].numpy()
            expected = expected / np.linalg.norm(expected)
            np.testing.assert_allclose(output.outputs.embedding, expected, atol=TOLERANCE)
    finally:
        llm.close()


@pytest.mark.parametrize("case", ["qwen3", "llama", "gemma2", "qwen3-moe"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifiers_give_probabilities(case: str, num_labels: int, tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification
    model = save(case, tmp_path, auto, num_labels=num_labels, pad_token_id=0)
    llm = open_llm(tmp_path)
    try:
        found = llm.classify(prompts(), use_tqdm=False)
        raw = llm.encode(prompts(), PoolingParams(use_activation=False), use_tqdm=False)
        for output, logits, ids in zip(found, raw, prompts(), strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([ids])).logits[0]
            np.testing.assert_allclose(logits.outputs.data, expected, atol=TOLERANCE)
            chances = expected.softmax(-1) if num_labels > 1 else expected.sigmoid()
            np.testing.assert_allclose(output.outputs.probs, chances, atol=TOLERANCE)
    finally:
        llm.close()


@pytest.mark.parametrize("case", ["qwen3", "qwen3-untied", "gemma2"])
@pytest.mark.parametrize("tokens", [(7, 9), (7,)])
def test_scores_are_logits_of_tokens(case: str, tokens: tuple[int, ...], tmp_path: Path) -> None:
    name, _, untied = case.partition("-")
    model = save(name, tmp_path, **({"tie_word_embeddings": False} if untied else {}))
    names = ("true_token_id", "false_token_id")
    config: dict[str, Any] = dict(zip(names, (*tokens, None), strict=False))
    write_modules(tmp_path, ("LogitScore", config))
    llm = open_llm(tmp_path)
    try:
        for output, ids in zip(llm.encode(prompts(), use_tqdm=False), prompts(), strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1]
            # of two tokens: the probability of the first beside the second
            pair = logits[[*tokens]].numpy() if len(tokens) == 2 else [logits[7].item(), 0.0]
            expected = np.exp(pair[0]) / np.exp(pair).sum()
            np.testing.assert_allclose(output.outputs.data, [expected], atol=TOLERANCE)
    finally:
        llm.close()


def test_any_decoder_is_an_embedding_model_with_runner_pooling(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    llm = open_llm(tmp_path, runner="pooling")
    try:
        [found] = llm.embed(prompts()[0], use_tqdm=False)
        expected = hidden_states(model, prompts()[0])[-1].numpy()
        expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(found.outputs.embedding, expected, atol=TOLERANCE)
        with pytest.raises(RequestError, match="an embedding model: it generates no text"):
            llm.generate(prompts()[0])
        with pytest.raises(RequestError, match="an embedding model"):
            llm.classify(prompts()[0])
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("told", "dimensions", "reason"),
    [
        ({}, 8, "fewer than 48"),
        ({"is_matryoshka": True}, 8, None),
        ({"is_matryoshka": True}, 49, "at most 48"),
        ({"matryoshka_dimensions": [8, 16]}, 16, None),
        ({"matryoshka_dimensions": [8, 16]}, 12, "8, 16"),
        ({}, 48, None),
    ],
)
def test_shorter_embeddings_are_cut_and_normalised(
    told: dict[str, Any], dimensions: int, reason: str | None, tmp_path: Path
) -> None:
    model = save("llama", tmp_path, AutoModel)
    config = json.loads((tmp_path / "config.json").read_text()) | told
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = open_llm(tmp_path)
    try:
        params = PoolingParams(dimensions=dimensions)
        if reason is not None:
            with pytest.raises(RequestError, match=reason) as caught:
                llm.embed(prompts()[0], pooling_params=params)
            assert caught.value.param == "dimensions"
            return
        [found] = llm.embed(prompts()[0], pooling_params=params, use_tqdm=False)
        expected = hidden_states(model, prompts()[0])[-1, :dimensions].numpy()
        expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(found.outputs.embedding, expected, atol=TOLERANCE)
    finally:
        llm.close()


def _wrong(kind: str, config: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: write_modules(folder, (kind, config))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_wrong("Dense", {}), "'Dense'"),
        (_wrong("Pooling", {"pooling_mode_max_tokens": True}), r"\['max'\]"),
        (_wrong("Pooling", {**MEAN, "pooling_mode_cls_token": True}), r"\['cls', 'mean'\]"),
        (_wrong("Pooling", {**MEAN, "include_prompt": False}), "include_prompt"),
        (_wrong("LogitScore", {"true_token_id": 999}), "token 999"),
        (_wrong("LogitScore", {"true_token_id": "yes"}), "true_token_id"),
        (lambda folder: (folder / "modules.json").write_text("{"), "no valid JSON"),
        (lambda folder: (folder / "modules.json").write_text('{"a": 1}'), "a list"),
        (
            lambda folder: (folder / "modules.json").write_text(
                '[{"path": "../x", "type": "a.Pooling"}]'
            ),
            "outside",
        ),
    ],
)
def test_modules_that_are_not_known_are_refused_by_name(
    break_it: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    save("llama", tmp_path)
    break_it(tmp_path)
    with pytest.raises(ModelError, match=reason):
        open_llm(tmp_path)


def test_a_model_whose_tokens_see_those_behind_them_is_refused(tmp_path: Path) -> None:
    save("qwen2", tmp_path, AutoModel)
    config = json.loads((tmp_path / "config.json").read_text()) | {"is_causal": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="is_causal"):
        open_llm(tmp_path)


def test_a_generation_model_says_what_it_is(tmp_path: Path) -> None:
    save("llama", tmp_path)
    llm = open_llm(tmp_path)
    try:
        for call in (llm.embed, llm.classify, llm.encode):
            with pytest.raises(RequestError, match=r"a generation model.*--runner pooling"):
                call([1, 2, 3])
        with pytest.raises(RequestError, match="a generation model"):
            llm.score("a", "b")
    finally:
        llm.close()
