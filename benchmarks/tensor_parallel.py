"""Compares one rank with several on the GPUs of one host: equal tokens, and the time of decoding.

    python benchmarks/tensor_parallel.py [--model qwen3-30b-a3b] [--layers 8] [--sizes 1,2]

Weights are random, of a public shape with few layers. Sums over ranks round differently in bf16, so
some sequences part there; in float32 all tokens must be equal. A decode is timed as (a run of
1 + N tokens - a run of 1) / N, the median of several. Prints one JSON object; exits with 1 if
float32 tokens differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from octavo import LLM, SamplingParams
from octavo.cli.bench.shapes import fixed_prompts, write_model

PROMPT_LENGTH, NUM_PROMPTS, NUM_TOKENS = 100, 8, 64
BATCHES = (1, 32)
TIMED_TOKENS, REPEATS = 128, 5
KV_BYTES = 2**30
"""Room for the longest of the batches, whatever else uses the GPUs."""

Tokens = list[list[int]]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def say(words: str) -> None:
    """To stderr, so that what takes long can be told from what hangs."""
    print(f"{time.perf_counter():.1f} {words}", file=sys.stderr, flush=True)


def decode_ms(llm: LLM, batch: int) -> float:
    """Returns the median milliseconds of one decode step of `batch` sequences."""

    def seconds(num_tokens: int, seed: int) -> float:
        prompts = fixed_prompts(llm.vocab_size, batch, PROMPT_LENGTH, seed)
        began = time.perf_counter()
        llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
        return time.perf_counter() - began

    say(f"batch {batch}: building kernels")
    seconds(TIMED_TOKENS, seed=1)  # builds kernels, captures graphs
    steps = [
        (seconds(1 + TIMED_TOKENS, 2 * i) - seconds(1, 2 * i + 1)) / TIMED_TOKENS
        for i in range(1, 1 + REPEATS)
    ]
    return 1e3 * statistics.median(steps)


def measure(folder: Path, dtype: str, size: int, device: str) -> tuple[Tokens, dict[str, float]]:
    """Returns greedy tokens of the prompts, and milliseconds and bytes by name."""
    say(f"{dtype}, {size} ranks: loading")
    began = time.perf_counter()
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        device=device,
        max_model_len=2048,
        max_num_seqs=max(BATCHES),
        prefix_caching="off",
        kv_cache_memory_bytes=KV_BYTES,
        tensor_parallel_size=size,
    )
    figures = {
        "start_seconds": time.perf_counter() - began,
        "weights_bytes": llm.plan.weights_bytes,
        "kv_tokens": llm.plan.num_tokens,
    }
    try:
        say(f"loaded in {figures['start_seconds']:.1f} s; greedy tokens")
        prompts = fixed_prompts(llm.vocab_size, NUM_PROMPTS, PROMPT_LENGTH, 0)
        outputs = llm.generate(prompts, greedy(NUM_TOKENS), use_tqdm=False)
        if dtype != "float32":  # that is for equal tokens
            figures |= {f"decode_ms_batch_{batch}": decode_ms(llm, batch) for batch in BATCHES}
    finally:
        llm.close()
    return [output.outputs[0].token_ids for output in outputs], figures


def agreement(one: Tokens, other: Tokens) -> dict[str, float]:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "equal_sequences": sum(x == y for x, y in zip(one, other, strict=True)),
        "num_sequences": len(one),
        "equal_token_share": sum(a == b for a, b in pairs) / len(pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a shape of octavo bench")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    report: dict[str, object] = {"model": arguments.model, "layers": arguments.layers}
    is_wrong = False
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as name:
        write_model(arguments.model, Path(name), arguments.layers)
        for dtype in arguments.dtypes.split(","):
            found = {size: measure(Path(name), dtype, size, arguments.device) for size in sizes}
            first = found[sizes[0]][0]
            for size, (tokens, figures) in found.items():
                same = agreement(first, tokens)
                report[f"{dtype}, {size} ranks"] = figures | same
                is_wrong |= dtype == "float32" and tokens != first
    print(json.dumps(report, indent=2))
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
