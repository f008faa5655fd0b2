"""What formats of the KV cache cost in quality, and gain in time on a CPU, as JSON lines.

    python -m benchmarks.kv_formats texts [FOLDER ...] > texts.jsonl
    python -m benchmarks.kv_formats quality MODEL [--texts-in FILE] [--device cuda] [--out FILE]
    python -m benchmarks.kv_formats errors MODEL [--texts-in FILE] [--device cuda] [--texts 4]
    python -m benchmarks.kv_formats speed MODEL [--tokens 4096] [--formats ...]

`quality` reads texts through the model in float32 (float_model.py), with the KV in float32 and in
each format, and compares the distributions of every eighth next token from the 256th on: `equal` is
the share whose most likely token is the same, `kl` the mean Kullback-Leibler divergence from
float32's, in nats; both with the standard error of their mean over texts. With --kernels keys and
values are written and attended by a GPU's kernels, else by plain torch. With --out each text's
line is appended to a file, and texts that are there are not read again.
`errors` tells how far what attention says is from what it says with float32 KV, for each layer: the
root of the sum of squared differences over that of squares, its input that of the float32 model.
`speed` times the attention of one decoding sequence through all layers of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.float_model import (
    FOLDERS,
    MAX_TOKENS,
    FloatModel,
    PlainOps,
    Text,
    batches,
    texts_below,
    texts_in,
)
from octavo.config import EngineConfig
from octavo.formats import kv_formats
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.kv_pages import write_vectors
from octavo.kernels.registry import Needs, select_ops
from octavo.kv_cache.spec import group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.layers.attention import Attention
from octavo.models.decoder import Decoder
from octavo.models.family import weight_shapes
from octavo.models.load_decoder import load_decoder
from octavo.models.registry import read_spec
from octavo.weights.hub import resolve_model
from octavo.weights.loader import open_source
from octavo.weights.placement import HostPlacement

BLOCK = 16
FIRST = 256
"""The first next token that is compared."""
ROWS = 512
"""Next tokens whose distributions are there at a time."""


def chosen_texts(arguments: argparse.Namespace) -> Iterator[Text]:
    file: Path | None = arguments.texts_in
    found = texts_below(arguments.folders or FOLDERS) if file is None else texts_in(file)
    return itertools.islice(found, arguments.texts)


def read_texts(
    model: FloatModel, arguments: argparse.Namespace
) -> Iterator[tuple[Text, list[int]]]:
    """Yields the texts, and as many of their ids as are to be read."""
    for text in chosen_texts(arguments):
        ids = model.ids(text.text)[: arguments.max_tokens]
        if len(ids) > FIRST + arguments.every:
            yield text, ids


def compared(
    model: FloatModel, ids: list[int], formats: list[str], arguments: argparse.Namespace
) -> dict[str, tuple[int, int, float]]:
    """Returns of each format: next tokens, those that are equal, and the sum of divergences."""
    hidden = {
        name: model.hidden(ids, model.storage(name, len(ids)), arguments.chunk)[
            FIRST :: arguments.every
        ]
        for name in ("float32", *formats)
    }
    sums: dict[str, tuple[int, int, float]] = dict.fromkeys(formats, (0, 0, 0.0))
    for at in range(0, len(hidden["float32"]), ROWS):
        rows = slice(at, at + ROWS)
        base = model.decoder.logits(hidden["float32"][rows]).log_softmax(-1)
        for name, (count, equal, total) in sums.items():
            other = model.decoder.logits(hidden[name][rows]).log_softmax(-1)
            same = int((base.argmax(-1) == other.argmax(-1)).sum())
            divergence = float((base.exp() * (base - other)).sum())
            sums[name] = count + len(base), equal + same, total + divergence
    return sums


def quality(arguments: argparse.Namespace) -> None:
    ops = None
    if arguments.kernels:
        from benchmarks.kernel_ops import KernelOps  # for who has Triton

        ops = KernelOps(torch.get_num_threads())
    model = FloatModel(arguments.model, torch.device(arguments.device), ops)
    name, formats = os.path.basename(arguments.model), arguments.formats.split(",")
    lines = _lines_of(arguments.out, name)
    for text, ids in read_texts(model, arguments):
        there = {line["format"] for line in lines if line["text"] == text.name}
        wanted = [one for one in formats if one not in there]
        if not wanted:
            continue
        for one, (count, equal, total) in compared(model, ids, wanted, arguments).items():
            line = {"model": name, "text": text.name, "format": one, "tokens": len(ids)}
            lines.append(line | {"compared": count, "equal": equal, "kl": total / count})
            if arguments.out is not None:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    for one in formats:
        print(json.dumps(summary(name, one, lines)), flush=True)


def _lines_of(file: Path | None, model: str) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["model"] == model]


def summary(model: str, formats: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the means over texts of one format, and their standard errors."""
    mine = [line for line in lines if line["format"] == formats]
    line: dict[str, Any] = {"model": model, "format": formats, "texts": len(mine)}
    if not mine:
        return line
    line["compared"] = sum(one["compared"] for one in mine)
    for key, numbers in (
        ("equal", [one["equal"] / one["compared"] for one in mine]),
        ("kl", [one["kl"] for one in mine]),
    ):
        line[key] = round(statistics.fmean(numbers), 5)
        if len(numbers) > 1:
            error = statistics.stdev(numbers) / len(numbers) ** 0.5
            line[f"{key}_error"] = round(error, 5)
    return line


class WatchedOps(PlainOps):
    """Says with every layer's float32 keys and values what formats would have made of it."""

    def __init__(self, base: KVStorage, others: dict[str, KVStorage], num_layers: int) -> None:
        super().__init__(torch.get_num_threads())
        self._others = others
        self._index = {id(base.layer(i)): i for i in range(num_layers)}
        self.squares = torch.zeros(num_layers, dtype=torch.float64)
        self.errors = {name: torch.zeros(num_layers, dtype=torch.float64) for name in others}

    def rope_attention(
        self, qkv_TN: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        out = super().rope_attention(qkv_TN, op, layer, batch)
        index = self._index[id(layer)]
        self.squares[index] += float(out.double().square().sum())
        for name, storage in self._others.items():
            other = super().rope_attention(qkv_TN, op, storage.layer(index), batch)
            self.errors[name][index] += float((other - out).double().square().sum())
        return out


def errors(arguments: argparse.Namespace) -> None:
    model = FloatModel(arguments.model, torch.device(arguments.device))
    names, num_layers = arguments.formats.split(","), len(model.decoder.layers)
    squares = torch.zeros(num_layers, dtype=torch.float64)
    sums = {name: torch.zeros(num_layers, dtype=torch.float64) for name in names}
    plain, count = model.decoder, 0
    for _, ids in read_texts(model, arguments):
        base = model.storage("float32", len(ids))
        others = {name: model.storage(name, len(ids)) for name in names}
        ops = WatchedOps(base, others, num_layers)
        model.decoder = dataclasses.replace(plain, ops=ops)
        model.hidden(ids, base, arguments.chunk)
        squares += ops.squares
        count += 1
        for name in names:
            sums[name] += ops.errors[name]
    for name in names:
        each = (sums[name] / squares).sqrt().tolist()
        line: dict[str, Any] = {"model": os.path.basename(arguments.model), "format": name}
        line |= {"texts": count, "error": round(statistics.fmean(each), 5)}
        line["layers"] = [round(one, 5) for one in each]
        print(json.dumps(line), flush=True)


class Reader:
    """A model on the CPU as it is served, and one sequence of its KV."""

    def __init__(self, model: str, num_threads: int) -> None:
        files = resolve_model(EngineConfig(model=model).resolve().model)
        spec, family = read_spec(files.config)
        source = open_source(files, "auto", weight_shapes(spec, family), 0)
        ops = select_ops("auto", Needs(num_threads=num_threads))
        torch.set_num_threads(ops.torch_threads)
        self.decoder: Decoder = load_decoder(spec, family, HostPlacement(source), ops, MAX_TOKENS)

    def storage(self, formats: str, num_tokens: int) -> KVStorage:
        groups = group_layers(self.decoder.spec.kv_specs(kv_formats(formats)))
        return KVStorage(groups, len(groups) * (-(-num_tokens // BLOCK) + 1), BLOCK)


def attention_ops(decoder: Decoder) -> list[AttentionOp]:
    return [layer.mixer.op for layer in decoder.layers if isinstance(layer.mixer, Attention)]


def speed(arguments: argparse.Namespace) -> None:
    reader = Reader(arguments.model, arguments.threads)
    names = arguments.formats.split(",")
    least = dict.fromkeys(("float32", *names), float("inf"))
    for _ in range(arguments.rounds):
        for formats in least:
            least[formats] = min(least[formats], _decode(reader, formats, arguments.tokens))
    for formats, seconds in least.items():
        line = {
            "model": os.path.basename(arguments.model),
            "format": formats,
            "tokens": arguments.tokens,
            "attention_us_layer": round(seconds * 1e6, 1),
            "of_float32": round(seconds / least["float32"], 3),
        }
        print(json.dumps(line), flush=True)


def _decode(reader: Reader, formats: str, num_tokens: int) -> float:
    """Returns the least seconds that a layer's attention takes, with the KV of all layers in
    turn."""
    storage, decoder = reader.storage(formats, num_tokens), reader.decoder
    ops, layers = decoder.ops, attention_ops(decoder)
    filled = batches(storage, 0, num_tokens)
    for index, op in enumerate(layers):
        slots = filled[storage.group_of(index)].slot_mapping_T
        for name in ("key", "value"):
            vectors = torch.randn(num_tokens, op.num_kv_heads, op.head_size)
            write_vectors(storage.layer(index), name, slots, vectors)
    step = batches(storage, num_tokens - 1, num_tokens)
    queries = [torch.randn(1, op.num_heads, op.head_size) for op in layers]
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for index, (q, op) in enumerate(zip(queries, layers, strict=True)):
            ops.attention(q, op, storage.layer(index), step[storage.group_of(index)])
        best = min(best, time.perf_counter() - start)
    return best / len(layers)


def texts(arguments: argparse.Namespace) -> None:
    for text in chosen_texts(arguments):
        print(json.dumps(text._asdict()), flush=True)


def main() -> None:
    jobs = {"quality": quality, "errors": errors, "speed": speed, "texts": texts}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=jobs)
    parser.add_argument("model", nargs="?", help="a file, a folder or a name; not for `texts`")
    parser.add_argument("--folders", nargs="*", help="whose documents are read")
    parser.add_argument("--texts-in", type=Path, help="a file that `texts` wrote")
    parser.add_argument("--formats", default="int8,fp8,int8/int4,int4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", action="store_true", help="the GPU's own, for `quality`")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=8000)
    parser.add_argument("--chunk", type=int, default=512, help="tokens read at a time")
    parser.add_argument("--every", type=int, default=8, help="which next tokens are compared")
    parser.add_argument("--out", type=Path, help="JSON lines of texts, kept and gone on with")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.model is None and arguments.what != "texts":
        parser.error(f"{arguments.what} needs a model")
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        jobs[arguments.what](arguments)


if __name__ == "__main__":
    main()
