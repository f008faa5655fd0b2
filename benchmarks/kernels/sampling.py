"""Times the sampling of one step on this GPU; prints one JSON object.

    python benchmarks/kernels/sampling.py [--rows 1,32,256] [--vocab 151936]

Per case: `call_us`, DeviceSampler.sample as a step calls it (host work included where it is the
longer); `kernels_us`, the same kernels replayed from a CUDA graph; `floor_us`, the bytes of the
logits over 3.0 TB/s (measured on an H100). Medians; of each row's logits 20 are far above the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.triton.sampling.kernels import KERNELS
from octavo.request import SamplingParams
from octavo.runner.device_sampler import DeviceSampler
from octavo.step import RowStart

BYTES_PER_US = 3.0e6
CALLS = 10
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.95},
    "top_p+top_k": {"top_p": 0.95, "top_k": 50},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}


def median_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Returns the median microseconds of one of the CALLS calls that `run` makes."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[len(times) // 2]


def make_logits(num_rows: int, vocab_size: int) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, device="cuda") * 2
    peaks = torch.randint(vocab_size, (num_rows, 20), device="cuda")
    return logits.scatter_(1, peaks, 12 + 3 * torch.rand(num_rows, 20, device="cuda"))


def make_sampler(num_rows: int, vocab_size: int, params: SamplingParams) -> DeviceSampler:
    sampler = DeviceSampler(vocab_size, num_rows, torch.device("cuda"), KERNELS)
    prompt = np.arange(1000, dtype=np.int32)
    for row in range(num_rows):
        sampler.start_row(
            RowStart(
                row=row,
                params=params,
                seed=row,
                stop_token_ids=(),
                prompt_len=len(prompt),
                token_ids=prompt,
            )
        )
    return sampler


def time_case(name: str, num_rows: int, logits: Tensor) -> dict[str, object]:
    sampler = make_sampler(num_rows, logits.shape[1], SamplingParams(**CASES[name]))
    rows = np.arange(num_rows, dtype=np.int32)

    def call() -> None:
        for index in range(CALLS):
            sampler.sample(logits, rows, np.full(num_rows, index, dtype=np.int32))

    call()
    torch.cuda.synchronize()
    call_us = median_us(call)
    batch = torch.from_numpy(np.stack((rows, rows), axis=1)).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            sampler.enqueue(logits, batch, rows)
    return {
        "case": name,
        "rows": num_rows,
        "floor_us": round(logits.nbytes / BYTES_PER_US, 2),
        "kernels_us": round(median_us(graph.replay), 2),
        "call_us": round(call_us, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--vocab", type=int, default=151_936)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = [
        # Logits anew for each case: penalties change them in place.
        time_case(name, num_rows, make_logits(num_rows, arguments.vocab))
        for num_rows in map(int, arguments.rows.split(","))
        for name in CASES
    ]
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**machine, "vocab": arguments.vocab, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
