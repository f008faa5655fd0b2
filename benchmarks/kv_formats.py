"""What formats of the KV cache cost in quality, and gain in time on a CPU, as JSON lines.

    python -m benchmarks.kv_formats quality MODEL [--texts N] [--formats ...] [FOLDER ...]
    python -m benchmarks.kv_formats speed MODEL [--tokens 4096] [--formats ...]

`quality` reads texts through the model, with the KV in float32 and in each format, and
compares the distributions of every eighth next token from the 256th on: `equal` is the share whose
most likely token is the same, `kl` the mean Kullback-Leibler divergence from float32's, in nats.
`speed` times the attention of one decoding sequence through all layers of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.engine.tokenizer import find_tokenizer
from octavo.formats import kv_formats
from octavo.kernels.inputs import AttentionBatch, AttentionOp
from octavo.kernels.kv_pages import write_vectors
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops
from octavo.kv_cache.spec import group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.layers.attention import Attention
from octavo.models.decoder import Decoder
from octavo.models.family import weight_shapes
from octavo.models.load_decoder import load_decoder
from octavo.models.registry import read_spec
from octavo.weights.hub import ModelFiles, resolve_model
from octavo.weights.loader import open_source
from octavo.weights.placement import HostPlacement

FOLDERS = ("/usr/share/doc/nodejs/api", "/usr/share/vim/vim90/doc", "/usr/share/cmake-3.25/Help")
"""Documents that Debian's packages bring."""
BLOCK, CHUNK = 16, 512
FIRST, EVERY = 256, 8
"""Next tokens that are compared."""


def texts(folders: Sequence[str]) -> Iterator[str]:
    """Yields documents of some length, in an order of their own."""
    paths = [
        path
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in (".md", ".txt", ".rst") and path.is_file()
    ]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        yield path.read_text(encoding="utf-8", errors="replace")


class Reader:
    """A model and one sequence of its KV."""

    def __init__(self, model: str, num_threads: int) -> None:
        self.config = EngineConfig(model=model).resolve()
        self.files: ModelFiles = resolve_model(model)
        spec, family = read_spec(self.files.config)
        source = open_source(self.files, "auto", weight_shapes(spec, family), 0)
        ops = select_ops("auto", Needs(num_threads=num_threads))
        torch.set_num_threads(ops.torch_threads)
        self.decoder: Decoder = load_decoder(spec, family, HostPlacement(source), ops, 8192)

    def ids(self, text: str) -> list[int]:
        return list(find_tokenizer(self.config, self.files).encode(text))

    def storage(self, formats: str, num_tokens: int) -> KVStorage:
        groups = group_layers(self.decoder.spec.kv_specs(kv_formats(formats)))
        return KVStorage(groups, len(groups) * (-(-num_tokens // BLOCK) + 1), BLOCK)

    def read(self, ids: Sequence[int], formats: str, ops: Ops | None = None) -> Tensor:
        """Returns log-probabilities [rows, V] of the next tokens that are compared."""
        decoder = self.decoder if ops is None else dataclasses.replace(self.decoder, ops=ops)
        storage = self.storage(formats, len(ids))
        counts = torch.zeros(len(decoder.spec.moe_layers), max(decoder.spec.max_experts, 1)).long()
        hidden = [
            decoder.forward(
                torch.tensor(ids[at : at + CHUNK], dtype=torch.int32),
                batches(storage, at, min(at + CHUNK, len(ids))),
                storage,
                counts,
            )
            for at in range(0, len(ids), CHUNK)
        ]
        return decoder.logits(torch.cat(hidden)[FIRST::EVERY]).log_softmax(-1)


def batches(storage: KVStorage, begin: int, end: int) -> tuple[AttentionBatch, ...]:
    """Returns the tokens from `begin` to `end` of one sequence, in every group."""
    num_groups, positions = len(storage.groups), torch.arange(begin, end)
    columns = torch.arange(storage.num_chunks // num_groups)
    found = []
    for group in range(num_groups):
        table = columns * num_groups + group
        slots = table[positions // BLOCK] * BLOCK + positions % BLOCK
        found.append(
            AttentionBatch(
                positions_T=positions.to(torch.int32),
                slot_mapping_T=slots,
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
                seq_lens_S=torch.tensor([end], dtype=torch.int32),
                block_table=table.to(torch.int32).view(1, -1),
            )
        )
    return tuple(found)


def divergence(base: Tensor, other: Tensor) -> tuple[float, float]:
    """Returns the share of equal most likely tokens, and the mean divergence."""
    equal = (base.argmax(-1) == other.argmax(-1)).float().mean()
    return float(equal), float((base.exp() * (base - other)).sum(-1).mean())


def quality(reader: Reader, arguments: argparse.Namespace) -> None:
    totals: dict[str, list[tuple[int, float, float]]] = {}
    count = 0
    for text in texts(arguments.folders or FOLDERS):
        ids = reader.ids(text)[: arguments.max_tokens]
        if len(ids) < arguments.min_tokens:
            continue
        base = reader.read(ids, "float32")
        for formats in arguments.formats.split(","):
            equal, kl = divergence(base, reader.read(ids, formats))
            totals.setdefault(formats, []).append((len(base), equal, kl))
        count += 1
        for formats, found in totals.items():
            weight = sum(rows for rows, _, _ in found)
            line = {
                "model": os.path.basename(arguments.model),
                "format": formats,
                "texts": count,
                "tokens": weight,
                "equal": round(sum(n * equal for n, equal, _ in found) / weight, 4),
                "kl": round(sum(n * kl for n, _, kl in found) / weight, 5),
            }
            if count == arguments.texts or arguments.verbose:
                print(json.dumps(line), flush=True)
        if count == arguments.texts:
            return


def attention_ops(decoder: Decoder) -> list[AttentionOp]:
    return [layer.mixer.op for layer in decoder.layers if isinstance(layer.mixer, Attention)]


def speed(reader: Reader, arguments: argparse.Namespace) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("model")
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--formats", default="int8,fp8,int4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--min-tokens", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verbose", action="store_true", help="a line after every text")
    arguments = parser.parse_args()
    reader = Reader(arguments.model, arguments.threads)
    {"quality": quality, "speed": speed}[arguments.what](reader, arguments)


if __name__ == "__main__":
    main()
