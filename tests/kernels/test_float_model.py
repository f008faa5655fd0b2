"""The model in plain torch that benchmarks of KV formats read texts with, and what they keep."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import kv_formats
from benchmarks.float_model import FloatModel, PlainOps, batches, texts_below, texts_in
from octavo.formats import kv_formats as formats_of
from octavo.kernels.kv_pages import mixed_as
from octavo.kernels.reference import ReferenceOps
from octavo.kv_cache.spec import attention_kv, group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.visibility import Chunk, Full, Visibility, Window
from tests.kernels.cases import floats
from tests.kernels.kv_cases import kv_op, make_stored
from tests.models.tiny import TinyModel, save_tiny


@pytest.mark.parametrize("visibility", [Full(), Window(20), Chunk(32)])
@pytest.mark.parametrize("formats", ["float32", "int8", "int4"])
@pytest.mark.parametrize("has_more", [False, True])
def test_all_scores_at_once_are_those_of_the_reference(
    rng: np.random.Generator, visibility: Visibility, formats: str, has_more: bool
) -> None:
    paged = make_stored(rng, [75], (2, 64), formats)
    sinks_H = floats(rng, 6) if has_more else None
    soft_cap = 3.0 if has_more else None
    op = kv_op(6, (2, 64), visibility=visibility, sinks_H=sinks_H, soft_cap=soft_cap)
    batch = paged.batch([75], [31])
    q = mixed_as(paged.layer, "key", floats(rng, 31, 6, 64))
    found = PlainOps(1).attention(q, op, paged.layer, batch)
    expected = ReferenceOps(1).attention(q, op, paged.layer, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class NumberTokens:
    """A tokenizer of texts that are numbers; other words are their lengths."""

    def encode(self, text: str) -> list[int]:
        return [int(word) % 200 if word.isdigit() else len(word) for word in text.split()]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyModel:
    monkeypatch.setattr("benchmarks.float_model.find_tokenizer", lambda *files: NumberTokens())
    return save_tiny("gemma3", tmp_path / "model")


def test_a_text_gives_what_transformers_says(tiny: TinyModel, rng: np.random.Generator) -> None:
    model = FloatModel(str(tiny.folder), torch.device("cpu"))
    ids = rng.integers(0, 200, 40).tolist()
    hidden = model.hidden(ids, model.storage("float32", len(ids)), chunk=16)
    expected = tiny.reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.decoder.logits(hidden), expected, rtol=1e-4, atol=1e-4)


def test_kernels_store_and_read_what_the_reference_does(
    rng: np.random.Generator,
) -> None:
    pytest.importorskip("tests.kernels.triton.interpreter")
    from benchmarks.kernel_ops import KernelOps

    groups = group_layers((attention_kv(2, 64, formats_of("int4").key),))
    op, qkv = kv_op(4, (2, 64)), floats(rng, 75, 8 * 64)
    found = []
    for ops in (PlainOps(1), KernelOps(1)):
        storage, begin = KVStorage(groups, 6, 16), 0
        for end in (70, 75):
            batch = batches(storage, begin, end)[0]
            out = ops.rope_attention(qkv[begin:end], op, storage.layer(0), batch)
            begin = end
        found.append(out)
    expected, kernels = found  # which of two numbers of int4 is nearer may depend on a last bit
    assert (kernels - expected).norm() < 2e-3 * expected.norm()


def test_texts_that_were_read_are_not_read_again(
    tiny: TinyModel,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kv_formats, "FIRST", 8)
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    words = (" ".join(map(str, rng.integers(0, 200, 40))) for _ in range(3))
    lines = [json.dumps({"name": f"{i}", "text": text}) for i, text in enumerate(words)]
    texts.write_text("\n".join(lines))
    arguments = Namespace(
        model=str(tiny.folder),
        device="cpu",
        kernels=False,
        formats="int8,fp8",
        texts=2,
        texts_in=texts,
        max_tokens=32,
        every=2,
        chunk=16,
        out=out,
    )
    kv_formats.quality(arguments)
    first, found = capsys.readouterr().out, out.read_text().splitlines()
    assert [json.loads(line)["text"] for line in found] == ["0", "0", "1", "1"]
    means = {one["format"]: one for one in map(json.loads, first.splitlines())}
    assert means["int8"]["compared"] == 24
    assert 0 < means["int8"]["kl"] < means["fp8"]["kl"]
    monkeypatch.setattr(kv_formats, "compared", None)
    kv_formats.quality(arguments)
    assert capsys.readouterr().out == first
    assert out.read_text().splitlines() == found


def test_errors_of_layers_are_those_of_formats(
    tiny: TinyModel,
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_formats, "FIRST", 8)
    texts = tmp_path / "texts.jsonl"
    text = " ".join(map(str, rng.integers(0, 200, 40)))
    texts.write_text(json.dumps({"name": "a", "text": text}))
    kv_formats.errors(
        Namespace(
            model=str(tiny.folder),
            device="cpu",
            formats="float32,int8,fp8",
            texts=1,
            texts_in=texts,
            max_tokens=32,
            every=1,
            chunk=16,
        )
    )
    exact, int8, fp8 = map(json.loads, capsys.readouterr().out.splitlines())
    assert exact["error"] == 0
    assert len(int8["layers"]) == tiny.config["num_hidden_layers"]
    assert all(0 < a < b < 0.1 for a, b in zip(int8["layers"], fp8["layers"], strict=True))


def test_documents_that_are_long_enough_come_in_an_order_of_their_own(tmp_path: Path) -> None:
    for name, size in (("b.txt", 12_000), ("a.md", 40_000), ("short.txt", 100), ("c.py", 20_000)):
        (tmp_path / name).write_text("x" * size)
    found = list(texts_below([str(tmp_path)]))
    assert {one.name: len(one.text) for one in found} == {"b.txt": 12_000, "a.md": 36_000}
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps(one._asdict()) for one in found))
    assert list(texts_in(file)) == found
