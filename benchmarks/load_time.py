"""How long a packed checkpoint takes until the engine is ready, and what it takes of memory.

    python benchmarks/load_time.py --layers 32 --layout awq --folder /dev/shm --starts 2

Writes a checkpoint with Mixtral-8x7B's published names and shapes (random codes, so many layers;
24 GB with all 32), then starts an engine on it in a process of its own, several times: the page
cache is warm, and from the second start on so are the kernels. Prints a line of JSON a start:
seconds to ready by phase; the most host memory of the process that is no mapped file; what lies on
the device beside the bytes of the files. Needs a GPU, or some layers on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from octavo.cli.bench.shapes import MODELS

GROUP = 128
CONFIG = dict(MODELS["mixtral-8x7b"].config)
KV_BYTES = 1 << 30
Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, safetensors' word for its type, and its shape."""
_ITEM_BYTES = {"I32": 4, "F16": 2, "BF16": 2, "I64": 8}
_POOL_BYTES = 1 << 26


def quantized(module: str, rows: int, cols: int, layout: str) -> Iterator[Entry]:
    """Yields the tensors of one matrix [rows, cols] in int4, groups of 128."""
    if layout == "awq":
        yield f"{module}.qweight", "I32", (cols, rows // 8)
        yield f"{module}.qzeros", "I32", (cols // GROUP, rows // 8)
        yield f"{module}.scales", "F16", (cols // GROUP, rows)
        return
    yield f"{module}.weight_packed", "I32", (rows, cols // 8)
    yield f"{module}.weight_scale", "BF16", (rows, cols // GROUP)
    yield f"{module}.weight_shape", "I64", (2,)


def entries(layer: int, layout: str) -> Iterator[Entry]:
    """Yields the tensors of a layer; of layer -1 what is outside of layers."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads = CONFIG["num_attention_heads"]
    kv_size = hidden // heads * CONFIG["num_key_value_heads"]
    if layer < 0:
        vocab = CONFIG["vocab_size"]
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        yield "lm_head.weight", "BF16", (vocab, hidden)
        yield "model.norm.weight", "BF16", (hidden,)
        return
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", "BF16", (hidden,)
    for part, rows in (("q", hidden), ("k", kv_size), ("v", kv_size), ("o", hidden)):
        yield from quantized(f"{prefix}.self_attn.{part}_proj", rows, hidden, layout)
    moe = f"{prefix}.block_sparse_moe"
    yield f"{moe}.gate.weight", "BF16", (CONFIG["num_local_experts"], hidden)
    for expert in range(CONFIG["num_local_experts"]):
        yield from quantized(f"{moe}.experts.{expert}.w1", inner, hidden, layout)
        yield from quantized(f"{moe}.experts.{expert}.w2", hidden, inner, layout)
        yield from quantized(f"{moe}.experts.{expert}.w3", inner, hidden, layout)


def write_shard(path: Path, tensors: list[Entry], shapes: dict[str, tuple[int, int]]) -> int:
    """Writes a safetensors file of random numbers; returns its bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, kind, shape in tensors:
        size = int(np.prod(shape)) * _ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(len(text))
    codes = rng.bytes(_POOL_BYTES)
    half = rng.uniform(0.001, 0.004, _POOL_BYTES // 2)
    numbers = {
        "F16": half.astype(np.float16).tobytes(),
        "BF16": (half.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind, shape in tensors:
            rest = int(np.prod(shape)) * _ITEM_BYTES[kind]
            if kind == "I64":
                file.write(np.array(shapes[name.rpartition(".")[0]]).tobytes())
                continue
            pool = memoryview(numbers.get(kind, codes))
            while rest:
                rest -= file.write(pool[:rest])
    return end


def write_checkpoint(folder: Path, layers: int, layout: str) -> int:
    """Writes config and shards of four layers; returns the bytes of all tensors."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    quantization: dict[str, Any] = {"quant_method": layout}
    if layout == "awq":
        quantization |= {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    else:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        quantization |= {"format": "pack-quantized", "config_groups": groups}
    config = CONFIG | {"num_hidden_layers": layers, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    everything = [-1, *range(layers)]
    shards = [everything[start : start + 4] for start in range(0, len(everything), 4)]
    kv_size = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    by_part = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    by_part |= {"k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden)}

    def write(index: int) -> int:
        tensors = [entry for layer in shards[index] for entry in entries(layer, layout)]
        shapes = {
            module: by_part.get(module.rpartition(".")[2], (hidden, hidden))
            for module in (name.rpartition(".")[0] for name, _, _ in tensors)
        }
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        return write_shard(folder / name, tensors, shapes)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(write, range(len(shards))))


class PeakHostMemory(threading.Thread):
    """The most that this process has of memory that is no page of a file. What a driver locked for
    it is not counted: threads of a placement have 32 MiB each."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            self.peak = max(self.peak, int(fields["RssAnon"].split()[0]) * 1024)
            time.sleep(0.005)


class Marks(logging.Handler):
    """When the engine told what."""

    def __init__(self, began: float) -> None:
        super().__init__(logging.INFO)
        self.began = began
        self.said: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((round(time.time() - self.began, 2), record.getMessage()))


def start(folder: str, device: str, stored: int) -> dict[str, Any]:
    """Starts an engine in this process; returns what was seen."""
    began = float(os.environ["BEGAN"])
    memory, marks = PeakHostMemory(), Marks(began)
    memory.start()
    logging.getLogger().addHandler(marks)
    logging.getLogger().setLevel(logging.INFO)
    phases = {"python": time.time() - began}
    import torch

    phases["torch"] = time.time() - began
    if device == "cuda":
        torch.zeros(1, device="cuda")
    phases["device"] = time.time() - began
    from octavo import LLM, SamplingParams

    phases["octavo"] = time.time() - began
    before_load = memory.peak
    llm = LLM(
        folder,
        device=device,
        skip_tokenizer_init=True,
        max_model_len=4096,
        kv_cache_memory_bytes=KV_BYTES,
    )
    phases["ready"] = time.time() - began
    peak = memory.peak
    found: dict[str, Any] = {"phases": {name: round(at, 2) for name, at in phases.items()}}
    found["peak_host_bytes"] = peak
    found["of_which_before_load"] = before_load
    if device == "cuda":
        found["device_bytes_beside_kv"] = torch.cuda.memory_allocated() - KV_BYTES
        found["most_device_bytes_beside_kv"] = torch.cuda.max_memory_allocated() - KV_BYTES
        found["over_stored"] = round(found["device_bytes_beside_kv"] / stored - 1, 4)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    output = llm.generate([list(range(5, 20))], params)[0]
    found["token_ids"] = list(output.outputs[0].token_ids)
    found["told"] = marks.said
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--layout", choices=("awq", "compressed-tensors"), default="awq")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        path, stored = args.child
        print(json.dumps(start(path, args.device, int(stored))), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        began = time.time()
        stored = write_checkpoint(Path(name), args.layers, args.layout)
        print(json.dumps({"written": stored, "seconds": round(time.time() - began, 1)}), flush=True)
        for _ in range(args.starts):
            command = [sys.executable, __file__, "--device", args.device]
            subprocess.run(
                [*command, "--child", name, str(stored)],
                env={**os.environ, "BEGAN": str(time.time())},
                check=True,
            )


if __name__ == "__main__":
    main()
