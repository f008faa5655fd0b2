"""A model in float32 and plain torch, on any device, that reads one text at a time.

Used by benchmarks that ask what a format does to a model's answers: weights are what their file
says, dequantised, and ops are those of the reference, whose KV cache is what kernels are tested
against, or kernel_ops.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.engine.load import MAX_SAMPLE
from octavo.engine.sample_text import SAMPLE_TEXT
from octavo.engine.tokenizer import find_tokenizer
from octavo.formats import WEIGHT_FORMATS, kv_formats
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.kv_pages import mixed_as, read_vectors
from octavo.kernels.reference import ReferenceOps, dequantize_rows
from octavo.kernels.weights import Weight
from octavo.kv_cache.spec import group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.models.family import weight_shapes
from octavo.models.load_decoder import load_decoder
from octavo.models.registry import read_spec
from octavo.models.sampled_keys import learn, with_room
from octavo.visibility import Chunk, Full, Window
from octavo.weights.hub import resolve_model
from octavo.weights.loader import open_source
from octavo.weights.placement import HostPlacement
from octavo.weights.source import TensorSource
from octavo.weights.split import Split

FOLDERS = ("/usr/share/doc/nodejs/api", "/usr/share/vim/vim90/doc", "/usr/share/cmake-3.25/Help")
"""Documents that Debian's packages bring."""
LEAST_CHARACTERS, MOST_CHARACTERS = 12_000, 36_000
"""Of a text: some 2,000 tokens and 8,000."""
MAX_TOKENS = 8192
BLOCK = 16


class Text(NamedTuple):
    """A document, or its beginning."""

    name: str
    text: str


def texts_below(folders: Sequence[str]) -> Iterator[Text]:
    """Yields the documents that are long enough, in an order of their own."""
    paths = [
        path
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in (".md", ".txt", ".rst") and path.is_file()
    ]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= LEAST_CHARACTERS:
            yield Text(path.name, text[:MOST_CHARACTERS])


def texts_in(file: Path) -> Iterator[Text]:
    """Yields the texts of a file of JSON lines, as `Text` has them."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            yield Text(one["name"], one["text"])


class FloatPlacement:
    """Matrices of a source as float32 numbers on a device."""

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self.device = device
        self._host = HostPlacement(source)

    def matrices(self, splits: Mapping[str, Split | None]) -> tuple[Weight, ...]:
        return tuple(self._float(weight) for weight in self._host.matrices(splits))

    def stack(self, splits: Mapping[str, Split | None]) -> Sequence[Weight]:
        return self.matrices(splits)

    def vector(self, name: str, split: Split | None = None) -> Tensor:
        return self._host.vector(name, split).to(self.device)

    def finish(self) -> None:
        """Nothing to wait for."""

    def _float(self, weight: Weight) -> Weight:
        data = dequantize_rows(weight, slice(0, weight.rows)).to(self.device)
        form = WEIGHT_FORMATS["f32"]
        return Weight(data=data, format=form, rows=weight.rows, cols=weight.cols)


class PlainOps(ReferenceOps):
    """The ops of the reference, for one sequence: all scores of a chunk at once."""

    def attention(
        self, q_THD: Tensor, op: AttentionOp, layer: KVLayer, batch: AttentionBatch
    ) -> Tensor:
        end = int(batch.seq_lens_S[0])
        blocks = batch.block_table[0, : -(-end // layer.key.shape[1])].long()
        k_NKD, v_NKD = (
            read_vectors(layer, name, blocks).flatten(0, 1)[:end] for name in ("key", "value")
        )
        group = op.num_heads // op.num_kv_heads
        q = q_THD.unflatten(1, (op.num_kv_heads, group)).permute(1, 2, 0, 3)
        scores = (q @ k_NKD.permute(1, 2, 0).unsqueeze(1)).mul_(op.scale)
        if op.soft_cap is not None:
            scores.div_(op.soft_cap).tanh_().mul_(op.soft_cap)
        scores.masked_fill_(~_seen(op, batch.positions_T.long(), end), -torch.inf)
        if op.sinks_H is not None:
            sinks = op.sinks_H.view(op.num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = torch.softmax(scores, -1)[..., :end]
        out = weights @ v_NKD.transpose(0, 1).unsqueeze(1)
        out_THD = out.permute(2, 0, 1, 3).reshape(q_THD.shape)
        return mixed_as(layer, "value", out_THD).flatten(1)


def _seen(op: AttentionOp, positions_T: Tensor, end: int) -> Tensor:
    """Returns [T, N]: which of the first `end` tokens each query sees."""
    at = torch.arange(end, device=positions_T.device)
    last = positions_T.unsqueeze(1)
    match op.visibility:
        case Full():
            return at <= last
        case Window(size):
            return (at <= last) & (at > last - size)
        case Chunk(size):
            return (at <= last) & (at >= last // size * size)


class FloatModel:
    """A model, and what it makes of texts with its KV in some format."""

    def __init__(self, model: str, device: torch.device, ops: PlainOps | None = None) -> None:
        """`ops`: see kernel_ops.py."""
        config, files = EngineConfig(model=model).resolve(), resolve_model(model)
        spec, family = read_spec(files.config)
        placement = FloatPlacement(
            open_source(files, "auto", weight_shapes(spec, family), 0), device
        )
        self.device = device
        self.ops = ops or PlainOps(torch.get_num_threads())
        decoder: Decoder = load_decoder(spec, family, placement, self.ops, MAX_TOKENS)
        self.decoder = with_room(decoder, device)
        self._tokenizer = find_tokenizer(config, files)
        ids = self.ids(SAMPLE_TEXT)[:MAX_SAMPLE]
        self.hidden(ids, self.storage("float32", len(ids)), len(ids), learn)

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def storage(self, formats: str, num_tokens: int) -> KVStorage:
        groups = group_layers(self.decoder.spec.kv_specs(kv_formats(formats)))
        return KVStorage(groups, len(groups) * (-(-num_tokens // BLOCK) + 1), BLOCK, self.device)

    def hidden(
        self,
        ids: Sequence[int],
        storage: KVStorage,
        chunk: int,
        look: Callable[[AttentionOp, Tensor], None] | None = None,
    ) -> Tensor:
        """Returns normed hidden states [T, M], read `chunk` tokens at a time; `look`: see
        `Forward`."""
        spec = self.decoder.spec
        shape = len(spec.moe_layers), max(spec.max_experts, 1)
        counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        parts = [
            self.decoder.forward(
                torch.tensor(ids[at : at + chunk], dtype=torch.int32, device=self.device),
                batches(storage, at, min(at + chunk, len(ids))),
                storage,
                counts,
                look=look,
            )
            for at in range(0, len(ids), chunk)
        ]
        return torch.cat(parts)


def batches(storage: KVStorage, begin: int, end: int) -> tuple[AttentionBatch, ...]:
    """Returns the tokens from `begin` to `end` of one sequence, in every group."""
    device = storage.arena.device
    num_groups, positions = len(storage.groups), torch.arange(begin, end, device=device)
    columns = torch.arange(storage.num_chunks // num_groups, device=device)
    found = []
    for group in range(num_groups):
        table = columns * num_groups + group
        slots = table[positions // BLOCK] * BLOCK + positions % BLOCK
        found.append(
            AttentionBatch(
                positions_T=positions.to(torch.int32),
                slot_mapping_T=slots,
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=device),
                seq_lens_S=torch.tensor([end], dtype=torch.int32, device=device),
                block_table=table.to(torch.int32).view(1, -1),
            )
        )
    return tuple(found)
