"""One stream's decode on the CPU beside what the memory allows, as JSON: a line a model.

    python benchmarks/cpu_decode.py demo:bfloat16 demo-moe:auto FILE.gguf:auto

A token reads the weights it meets once; the floor is their bytes over the read bandwidth, which is
measured before each of the runs, since other work may share the machine. The best of the runs
counts, and its share of the best bandwidth's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator

import torch

from octavo import LLM, SamplingParams
from octavo.kernels.weights import Weight
from octavo.layers.attention import Attention
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.models.decoder import Decoder

PROMPT, TOKENS = "A river begins in the mountains, and", 96


def read_rate(probe: torch.Tensor, threads: int, repeats: int = 8) -> float:
    """Returns the bytes a second that torch reads on so many threads, the best of some."""
    torch.set_num_threads(threads)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        probe.sum()
        best = max(best, probe.nbytes / (time.perf_counter() - began))
    torch.set_num_threads(1)
    return best


def weights_of_a_token(decoder: Decoder) -> Iterator[tuple[Weight, float]]:
    """Yields the matrices that a token meets, and which part of the tokens does."""
    for layer in decoder.layers:
        assert isinstance(layer.mixer, Attention), "latent attention is not counted"
        yield from ((one, 1.0) for one in (*layer.mixer.qkv, layer.mixer.output))
        mlp = layer.mlp
        if isinstance(mlp, GatedMLP):
            yield from ((one, 1.0) for one in (mlp.gate, mlp.up, mlp.down))
            continue
        assert isinstance(mlp, MoE)
        share = mlp.router.rule.top_k / len(mlp.experts.gate)
        yield from ((one, 1.0) for one in mlp.router.weights)
        experts = mlp.experts
        yield from ((one, share) for one in (*experts.gate, *experts.up, *experts.down))
    assert decoder.lm_head is not None
    yield decoder.lm_head, 1.0


def bytes_of_a_token(decoder: Decoder) -> float:
    return sum(
        share * one.rows * one.format.row_bytes(one.cols)
        for one, share in weights_of_a_token(decoder)
    )


def measure(model: str, dtype: str, runs: int, threads: int) -> dict[str, object]:
    llm = LLM(model, dtype=dtype, max_model_len=1024, num_threads=threads)
    size = bytes_of_a_token(llm._core._runner.decoder)  # pyright: ignore
    probe = torch.ones(64 << 20)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm.generate([PROMPT], params)
    rate, wall, cpu = 0.0, float("inf"), float("inf")
    for _ in range(runs):
        rate = max(rate, read_rate(probe, threads))
        began, spent = time.perf_counter(), time.process_time()
        llm.generate([PROMPT], params)
        wall = min(wall, (time.perf_counter() - began) / TOKENS)
        cpu = min(cpu, (time.process_time() - spent) / TOKENS)
    return {
        "model": model,
        "dtype": dtype,
        "tokens_per_second": round(1 / wall, 1),
        "floor_tokens_per_second": round(rate / size, 1),
        "of_floor": round(size / rate / wall, 3),
        "cpu_ms_per_token": round(cpu * 1e3, 2),
        "megabytes_per_token": round(size / 1e6, 1),
        "read_gb_per_second": round(rate / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="One stream's decode on the CPU")
    parser.add_argument("models", nargs="+", metavar="MODEL:DTYPE")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    for one in options.models:
        model, _, dtype = one.rpartition(":")
        print(json.dumps(measure(model, dtype, options.runs, options.threads)), flush=True)


if __name__ == "__main__":
    main()
