"""Vectors and scores where the model is spread over ranks, and the server over front processes."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from octavo import LLM
from tests.server.fronts import Fronts
from tests.server.tiny_engine import write_model

pytestmark = pytest.mark.slow

TEXTS = ["Once upon a time", "there was", "a hello world, and it counted"]
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mean": ({}, ()),
    "labels": ({}, ("--label-tokens", "y", "n")),
}


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Fronts, LLM, str]]:
    """A server of two ranks and two front processes, and the same model alone."""
    told, options = KINDS[request.param]
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder)
    config = json.loads((folder / "config.json").read_text()) | told
    (folder / "config.json").write_text(json.dumps(config))
    if request.param == "mean":
        modules = [{"idx": 0, "type": "sentence_transformers.models.Transformer", "path": ""}]
        modules.append(
            {"idx": 1, "type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
        )
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    fronts = Fronts(folder, tmp_path / "log", *SHARED, *options)
    more = {"label_tokens": ("y", "n")} if options else {}
    alone = LLM(str(folder), load_format="dummy", dtype="float32", num_threads=1, **SIZES, **more)
    assert fronts.url
    yield fronts, alone, request.param
    alone.close()
    fronts.process.terminate()
    assert fronts.end() == 0


SHARED = ("--tensor-parallel-size=2", "--api-processes=2", "--api-key", "one", "other")
SIZES: dict[str, Any] = {"kv_cache_memory_bytes": 2**24, "max_num_seqs": 8}


def ask(url: str, path: str, body: dict[str, Any], key: str = "one") -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_two_ranks_and_two_fronts_tell_what_one_process_does(
    served: tuple[Fronts, LLM, str],
) -> None:
    fronts, alone, kind = served
    raw = [one.outputs.data for one in alone.encode(TEXTS, use_tqdm=False)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, fronts.url, "/pooling", {"input": TEXTS}) for _ in range(8)]
        for answer in asked:
            found = [one["data"] for one in answer.result()["data"]]
            np.testing.assert_allclose(found, raw, rtol=1e-3, atol=1e-5)
    scores = [one.outputs.score for one in alone.score(TEXTS[0], TEXTS[1:], use_tqdm=False)]
    body = {"text_1": TEXTS[0], "text_2": TEXTS[1:]}
    told = [one["score"] for one in ask(fronts.url, "/v1/score", body, "other")["data"]]
    np.testing.assert_allclose(told, scores, rtol=1e-3, atol=1e-5)
    body = {"query": TEXTS[0], "documents": TEXTS[1:]}
    results = ask(fronts.url, "/v1/rerank", body)["results"]
    told = [one["relevance_score"] for one in results]
    np.testing.assert_allclose(told, sorted(scores, reverse=True), rtol=1e-3, atol=1e-5)
    if kind == "mean":
        vectors = ask(fronts.url, "/v1/embeddings", {"input": TEXTS})["data"]
        np.testing.assert_allclose([one["embedding"] for one in vectors], raw, rtol=1e-3, atol=1e-5)
