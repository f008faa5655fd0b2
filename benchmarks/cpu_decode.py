"""One stream's decode on the CPU beside what the memory allows, as JSON: a line a model.

    python benchmarks/cpu_decode.py demo:bfloat16 demo-moe:auto:int8:int4 FILE.gguf:auto [--peer]
        [--only stream,prompt,streams]

A model is followed by its dtype, then, if they are wanted, its activation_dtype and quantization.
With a prompt of 1,024 tokens and 16 streams beside it; --peer runs llama.cpp (PyPI's xllamacpp) on
the same GGUF file, in turn with it; `gguf_twin.py` writes one of the demo's MoE, and dense ones in
other formats. One stream's rate is that of the tokens behind the first, as llama.cpp's clock tells
it: what a run with one token takes is taken off. A token reads the weights it meets once; the floor
is their bytes over the read bandwidth, which is measured before each of the runs, since other work
may share the machine. The best of the runs counts, and its share of the best bandwidth's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from octavo import LLM, SamplingParams
from octavo.kernels.weights import Weight
from octavo.layers.attention import Attention
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.models.decoder import Decoder

OTHER_FORMATS = ("activation_dtype", "quantization")
FIGURES = ("stream", "prompt", "streams")
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
            yield from ((one, 1.0) for one in (*mlp.gate_up, mlp.down))
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


class LlamaCpp:
    """llama.cpp on a GGUF file: rates of one stream, as its own clock tells them."""

    def __init__(self, path: str, threads: int) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports]

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_ctx, params.n_parallel, params.warmup = 2048, 1, True
        self._server = xllamacpp.Server(params)

    def rates(self, prompt: str | list[int], tokens: int) -> tuple[float, float]:
        """Returns the tokens a second of a prompt, and of what follows."""
        asked = {
            **{"prompt": prompt, "max_tokens": tokens, "temperature": 0.0},
            **{"ignore_eos": True, "cache_prompt": False},
        }
        timings = self._server.handle_completions(asked)["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]


def prompt_rate(llm: LLM, prompts: list[list[int]]) -> float:
    """Returns the tokens a second of the fastest prompt."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    best = 0.0
    for prompt in prompts:
        began = time.perf_counter()
        llm.generate([prompt], params)
        best = max(best, len(prompt) / (time.perf_counter() - began))
    return best


def stream_rate(llm: LLM, prompt: list[int], streams: int, runs: int) -> float:
    """Returns the output tokens a second of so many streams at once, the best of the runs."""
    prompts = [[*prompt, one + 1000] for one in range(streams)]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    best = 0.0
    for _ in range(runs):
        began = time.perf_counter()
        llm.generate(prompts, params)
        best = max(best, streams * TOKENS / (time.perf_counter() - began))
    return best


@dataclass
class Lone:
    """Seconds that runs of one stream took, on the clock and of all cores: the least."""

    wall: float = float("inf")
    cpu: float = float("inf")

    def run(self, llm: LLM, tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        began, spent = time.perf_counter(), time.process_time()
        llm.generate([PROMPT], params)
        self.wall = min(self.wall, time.perf_counter() - began)
        self.cpu = min(self.cpu, time.process_time() - spent)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its number formats."""

    model: str
    dtype: str
    activation_dtype: str = "auto"
    quantization: str | None = None


def parse_case(text: str) -> Case:
    """Returns what MODEL:DTYPE[:ACTIVATION_DTYPE[:QUANTIZATION]] says."""
    model, dtype, *others = text.split(":")
    return Case(model=model, dtype=dtype, **dict(zip(OTHER_FORMATS, others, strict=False)))


def measure(
    case: Case, runs: int, threads: int, has_peer: bool, only: Sequence[str]
) -> dict[str, object]:
    """Returns the figures that `only` names, of FIGURES."""
    model = case.model
    llm = LLM(**asdict(case), max_model_len=2048, num_threads=threads)
    decoder: Decoder = llm._core._runner.decoder  # pyright: ignore
    size = bytes_of_a_token(decoder)
    probe = torch.ones(64 << 20)
    Lone().run(llm, TOKENS)
    rate, first, whole = 0.0, Lone(), Lone()
    peer = LlamaCpp(model, threads) if has_peer else None
    draw = random.Random(0)
    prompts = [[draw.randrange(1000, 20000) for _ in range(1024)] for _ in range(3)]
    peer_prompt, peer_decode = 0.0, 0.0
    for at in range(runs):
        if peer is not None:
            peer_decode = max(peer_decode, peer.rates(PROMPT, TOKENS)[1])
            if "prompt" in only and at < len(prompts):
                peer_prompt = max(peer_prompt, peer.rates(prompts[at], 1)[0])
        rate = max(rate, read_rate(probe, threads))
        first.run(llm, 1)
        whole.run(llm, TOKENS)
    wall, cpu = (whole.wall - first.wall) / (TOKENS - 1), (whole.cpu - first.cpu) / (TOKENS - 1)
    return {
        **asdict(case),
        "isa": getattr(decoder.ops, "isa", None),
        "tokens_per_second": round(1 / wall, 1),
        "floor_tokens_per_second": round(rate / size, 1),
        "of_floor": round(size / rate / wall, 3),
        "cpu_ms_per_token": round(cpu * 1e3, 2),
        "megabytes_per_token": round(size / 1e6, 1),
        "read_gb_per_second": round(rate / 1e9, 1),
        **others(llm, prompts, runs, only),
        **({} if peer is None else {"peer_tokens_per_second": round(peer_decode, 1)}),
        **({"peer_prompt_tokens_per_second": round(peer_prompt)} if peer_prompt else {}),
        "load_average": round(os.getloadavg()[0], 1),
    }


def others(llm: LLM, prompts: list[list[int]], runs: int, only: Sequence[str]) -> dict[str, object]:
    """Returns the rates of prompts and of 16 streams, where `only` names them."""
    found: dict[str, object] = {}
    if "prompt" in only:
        found["prompt_tokens_per_second"] = round(prompt_rate(llm, prompts[:runs]))
    if "streams" in only:
        rate = stream_rate(llm, prompts[0][:128], 16, max(1, runs // 2))
        found["streams_16_tokens_per_second"] = round(rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="One stream's decode on the CPU")
    parser.add_argument("models", nargs="+", type=parse_case, metavar="MODEL:DTYPE")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", action="store_true", help="llama.cpp beside it, on GGUF files")
    parser.add_argument("--only", default=",".join(FIGURES), help="what is measured, of these")
    options = parser.parse_args()
    for one in options.models:
        line = measure(one, options.runs, options.threads, options.peer, options.only.split(","))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
