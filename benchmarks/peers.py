"""Sums over the GPUs of one host: whether they are right, and how long they take.

    python -m benchmarks.peers check|times [--size 2] [--rows 1,32,8192]

Starts a process a GPU. `check` compares with float64 and between ranks, launched one by one and as
CUDA graphs; `times` gives microseconds of a sum as a graph of many replays it, through the library
(NCCL) and through the ranks' memory, alone and with the norm that follows. A line a case as it
comes, a JSON object at the end of `times`; exits with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from octavo.kernels.facts import PEER_BYTES
from octavo.kernels.inputs import HeldParts
from octavo.kernels.triton.peers.sums import PeerSums, over_peers
from octavo.kernels.triton.small.norm import rms_norm
from octavo.parallel import Collectives, Meeting, PeerMemory, TorchCollectives

COLUMNS, EPS = 2048, 1e-6
ROWS = (1, 2, 8, 32, 100, 256, 257, 1000, 2048, 5000, 8192)
TIMED_ROWS = (1, 32, 128, 512, 2048, 8192)
REPLAYS = 1000
BF16 = torch.bfloat16
GATES = {"ungated": 1 << 30, "gated": 0}
"""Up to how many rows all words are looked at, by kind of sum."""
MANY_ROWS = 1000
LATE_CYCLES = 200_000
"""That one rank comes later than the other: some 0.1 ms."""


class Rank:
    """One of the processes."""

    def __init__(self, rank: int, address: str, size: int) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        meeting = Meeting.at(address, size)
        self.base = TorchCollectives(meeting, rank, self.device)
        self.is_wrong = False

    def say(self, words: str) -> None:
        if self.base.rank == 0:
            print(words, flush=True)

    def fail(self, words: str) -> None:
        self.is_wrong = True
        print(f"WRONG on rank {self.base.rank}: {words}", flush=True)

    def parts(self, seed: int, *shape: int, dtype: torch.dtype = BF16) -> list[Tensor]:
        """Returns what every rank adds, alike on all."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, device=self.device).to(dtype)
            for _ in range(self.base.size)
        ]


def held_ids(rank: Rank, count: int, top_k: int) -> list[Tensor]:
    """Returns for every rank which of a token's experts it has: each is on one."""
    generator = torch.Generator(rank.device).manual_seed(count)
    shape, size = (count, top_k), rank.base.size
    ids = torch.randint(0, 64 * size, shape, generator=generator, device=rank.device)
    return [torch.where(ids % size == one, ids // size, -1).int() for one in range(size)]


def is_same_everywhere(base: Collectives, x: Tensor) -> bool:
    words = x.view(torch.int16 if x.itemsize == 2 else torch.int32).long().flatten()
    places = torch.arange(len(words), device=x.device) % 8191 + 1
    digest = int((words * places).sum() % (1 << 61))
    least, most = base.least([digest, -digest])
    return least == -most


def exact_sum(parts: list[Tensor]) -> Tensor:
    """Returns the sum in rank order in float32, rounded once."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


def is_right(sums: PeerSums, found: Tensor, expected: Tensor) -> bool:
    """The library rounds on its way."""
    if sums.holds(len(found)):
        return torch.equal(found, expected)
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=5e-2)


def check(rank: Rank) -> None:
    for dtype in (torch.float32, BF16):
        sums = over_peers(rank.base, COLUMNS, dtype, rank.device)
        if not isinstance(sums, PeerSums):
            return rank.fail("the ranks' memory is not used")
        for count in ROWS:
            check_rows(rank, sums, count, dtype)
        sums.check()
    check_graph(rank, sums)
    return None


def check_rows(rank: Rank, sums: PeerSums, count: int, dtype: torch.dtype) -> None:
    base, error = rank.base, 0.0
    for seed in range(3):
        parts = rank.parts(seed, count, COLUMNS, dtype=dtype)
        exact = torch.stack(parts).double().sum(0)
        expected = exact_sum(parts)
        found = sums.all_reduce(parts[base.rank].clone())
        error = ((found.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
        if not is_right(sums, found, expected):
            rank.fail(f"{dtype} {count} rows: a sum")
        if not sums.holds(count):
            continue
        weight = torch.linspace(0.5, 2, COLUMNS, device=rank.device).to(dtype)
        residual = rank.parts(100 + seed, count, COLUMNS, dtype=dtype)[0]
        kept = residual.clone()
        normed = rms_norm(expected, kept, weight, EPS)
        out = sums.add_rms_norm(parts[base.rank], residual, weight, EPS)
        if out is None or not torch.equal(residual, kept):
            rank.fail(f"{dtype} {count} rows: the residual")
        elif not torch.allclose(out.float(), normed.float(), rtol=1e-2, atol=1e-2):
            rank.fail(f"{dtype} {count} rows: the norm")
        elif not (is_same_everywhere(base, out) and is_same_everywhere(base, found)):
            rank.fail(f"{dtype} {count} rows: other bits on other ranks")
        of_parts = rank.parts(200 + seed, count, 8, COLUMNS, dtype=dtype)
        whole = [part.float().sum(1).to(dtype) for part in of_parts]
        residual.zero_()
        sums.add_rms_norm(of_parts[base.rank], residual, weight, EPS)
        if not torch.allclose(residual.float(), exact_sum(whole).float(), rtol=2e-2, atol=5e-2):
            rank.fail(f"{dtype} {count} rows: parts")
        ids = held_ids(rank, count, 8)
        whole = [HeldParts(rows_TSM=part, ids_TK=own).added()
                 for part, own in zip(of_parts, ids, strict=True)]  # fmt: skip
        residual.zero_()
        own = ids[base.rank]
        of_parts[base.rank][own < 0] = torch.nan
        sums.add_rms_norm(of_parts[base.rank], residual, weight, EPS, own)
        if not torch.equal(residual, exact_sum(whole)):
            rank.fail(f"{dtype} {count} rows: held parts")
    rank.say(f"check {dtype} {count:5} rows: error {error:.1e} {'WRONG' if rank.is_wrong else ''}")


def check_graph(rank: Rank, sums: PeerSums) -> None:
    """Many replays of a graph of sums of several sizes, between launches one by one."""
    base, counts, dtype = rank.base, (1, 32, 600, 1, 8192), sums.dtype
    inputs = [torch.empty(count, COLUMNS, device=rank.device, dtype=dtype) for count in counts]
    outputs = [torch.empty_like(one) for one in inputs]
    parts: list[list[Tensor]] = []

    def body() -> None:
        for one, out in zip(inputs, outputs, strict=True):
            out.copy_(sums.all_reduce(one.clone()))

    body()
    graph = captured(body)
    began = time.perf_counter()
    for step in range(REPLAYS):
        if step % 100 == 0:
            parts = [rank.parts(step + index, *one.shape, dtype=dtype)
                     for index, one in enumerate(inputs)]  # fmt: skip
            for one, part in zip(inputs, parts, strict=True):
                one.copy_(part[base.rank])
        graph.replay()
        if step % 100 in (0, 99):
            for part, out in zip(parts, outputs, strict=True):
                if not is_right(sums, out, exact_sum(part)):
                    rank.fail(f"replay {step}: a sum of {len(out)} rows")
            body()
            sums.check()
    torch.cuda.synchronize()
    rank.say(f"check {REPLAYS} replays: {time.perf_counter() - began:.1f} s")


def captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph


def times(rank: Rank, counts: list[int]) -> None:
    base, dtype = rank.base, BF16
    report: dict[str, dict[int, float]] = {}
    spare = base.peer_memory(PEER_BYTES, rank.device)
    kinds: dict[str, PeerSums] = {}
    for name, ungated_rows in GATES.items():
        memory = base.peer_memory(PEER_BYTES, rank.device)
        kinds[name] = PeerSums(base, memory, COLUMNS, dtype)
        kinds[name].ungated_rows = ungated_rows
    for count in counts:
        for name, sums in kinds.items():
            if count > MANY_ROWS and name == "ungated":
                continue
            check_rows(rank, sums, count, dtype)
            x = torch.zeros(count, COLUMNS, device=rank.device, dtype=dtype)
            for what, body in bodies(rank, sums, x) if sums.holds(count) else ():
                _time(rank, report, count, f"{name}, {what}", body)
            sums.check()
        x = torch.zeros(count, COLUMNS, device=rank.device, dtype=dtype)
        for what, body in others(rank, spare, x):
            _time(rank, report, count, what, body)
    rank.say(json.dumps({"sum_microseconds": report}))


def _time(
    rank: Rank,
    report: dict[str, dict[int, float]],
    count: int,
    name: str,
    body: Callable[[], object],
) -> None:
    found = microseconds(rank.base, body, 96 if count <= MANY_ROWS else 16)
    report.setdefault(name, {})[count] = found
    rank.say(f"times {count:5} rows {name:28} {found:8.1f} us")


def bodies(rank: Rank, sums: PeerSums, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    base, residual = rank.base, torch.zeros_like(x)
    weight = torch.ones(COLUMNS, device=rank.device, dtype=x.dtype)

    def late(which: int) -> None:
        if base.rank == which:
            torch.cuda._sleep(LATE_CYCLES)
        sums.add_rms_norm(x, residual, weight, EPS)

    yield "norm", lambda: sums.add_rms_norm(x, residual, weight, EPS)
    yield "alone", lambda: sums.all_reduce(x)
    parts = x.unsqueeze(1).repeat(1, 8, 1)
    yield "8 parts", lambda: sums.add_rms_norm(parts, residual, weight, EPS)
    ids = held_ids(rank, len(x), 8)[base.rank]
    yield "8 held parts", lambda: sums.add_rms_norm(parts, residual, weight, EPS, ids)
    for which in range(base.size):
        yield f"{which} waits", lambda which=which: late(which)


def others(rank: Rank, memory: PeerMemory, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What sums are measured against."""
    base, residual = rank.base, torch.zeros_like(x)
    weight = torch.ones(COLUMNS, device=rank.device, dtype=x.dtype)
    there = memory.buffers[(base.rank + 1) % base.size][: x.nbytes].view(x.dtype).view(x.shape)
    yield "library", lambda: base.all_reduce(x)
    yield "library, norm", lambda: rms_norm(base.all_reduce(x), residual, weight, EPS)
    yield "norm alone", lambda: rms_norm(x, residual, weight, EPS)
    yield "waiting alone", lambda: torch.cuda._sleep(LATE_CYCLES)
    yield "a copy to the next rank", lambda: there.copy_(x)


def microseconds(base: Collectives, body: Callable[[], object], count: int) -> float:
    """Returns the median time of one of `count` that a graph runs one after the other."""
    body()
    body()

    def many() -> None:
        for _ in range(count):
            body()

    graph = captured(many)
    found: list[float] = []
    for _ in range(7):
        base.least([0])
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        found.append(1e3 * first.elapsed_time(last) / count)
    return sorted(found)[len(found) // 2]


def run_rank(stage: str, rank: int, address: str, size: int, counts: list[int]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    one = Rank(rank, address, size)
    with torch.inference_mode():
        if stage == "check":
            check(one)
        else:
            times(one, counts)
    one.base.least([0])  # nobody leaves while another may still write
    one.base.abort()
    return int(one.is_wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("check", "times"))
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--rows", default=",".join(map(str, TIMED_ROWS)), help="of times")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        counts = [int(one) for one in arguments.rows.split(",")]
        one = arguments.rank, arguments.address, arguments.size
        return run_rank(arguments.stage, *one, counts)
    keeper = Meeting("127.0.0.1", arguments.size)
    command = [sys.executable, "-m", "benchmarks.peers", arguments.stage]
    command += ["--size", str(arguments.size), "--address", keeper.address]
    command += ["--rows", arguments.rows]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(arguments.size)]
    try:
        while all(one.poll() is None for one in ranks):
            time.sleep(0.1)
        if any(one.poll() for one in ranks):  # the others would wait for it
            time.sleep(5)
        else:
            for one in ranks:
                one.wait(30)
    finally:
        for one in ranks:
            with suppress(ProcessLookupError):
                one.kill()
    return int(any(one.wait() != 0 for one in ranks))


if __name__ == "__main__":
    sys.exit(main())
