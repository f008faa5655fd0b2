"""Counts what a walk through all kinds of steps would have Triton build; run by test_warm_up.py.

`python -m tests.runner.binaries SHAPE` prints a line "PHASE KERNEL" for every binary in the order
in which it is first wanted. Kernels are specialised for a Hopper by Triton's own front end, but
neither built nor run: a GPU is not needed, nor time. With `--build` those of the warm-up are
compiled for a Hopper, which needs no GPU either.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from octavo.kernels.triton.launching import building, chip

chip.is_hopper = lambda device: True  # before the kernels' modules ask it

from octavo.cli.bench.shapes import MODELS  # noqa: E402
from octavo.config import EngineConfig  # noqa: E402
from octavo.formats import kv_formats  # noqa: E402
from octavo.kernels.planning import PlanLimits  # noqa: E402
from octavo.kernels.triton.attention.plan import StepPlanner  # noqa: E402
from octavo.kernels.triton.backend import TritonOps  # noqa: E402
from octavo.kernels.triton.sampling.kernels import KERNELS  # noqa: E402
from octavo.kv_cache.spec import group_layers  # noqa: E402
from octavo.kv_cache.storage import KVStorage  # noqa: E402
from octavo.models.family import weight_shapes  # noqa: E402
from octavo.models.load_decoder import load_decoder  # noqa: E402
from octavo.models.registry import read_spec  # noqa: E402
from octavo.request import SamplingParams  # noqa: E402
from octavo.runner import build, device_sampler, model_runner  # noqa: E402
from octavo.runner.device import device_equipment  # noqa: E402
from octavo.runner.device_sampler import DeviceSampler  # noqa: E402
from octavo.runner.graphs import StepGraphs  # noqa: E402
from octavo.runner.model_runner import ModelRunner  # noqa: E402
from octavo.runner.rehearsal import Rehearsal  # noqa: E402
from octavo.runner.transfer import HostTransfer  # noqa: E402
from octavo.step import RowStart, StepPlan, token_purposes  # noqa: E402
from octavo.weights.dummy import DummySource  # noqa: E402
from octavo.weights.placement import DevicePlacement  # noqa: E402
from tests.runner.deltas import row_delta  # noqa: E402

SMALLER = {"num_hidden_layers": 2, "vocab_size": 9000}
MAX_SEQS, MAX_TOKENS, MAX_LEN, NUM_BLOCKS = 256, 4096, 8192, 8192
CPU = torch.device("cpu")
HOPPER = GPUTarget("cuda", 90, 32)


class Log:
    """Stands for the compiler: notes what it is asked for."""

    phase = "warm-up"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def build(
        self, function: Any, key: Any, signature: Any, device: int, *rest: Any, **more: Any
    ) -> Any:
        print(self.phase, function.__name__)
        self.asked.append((function, signature, *rest[:3]))
        nothing = SimpleNamespace(
            run=lambda *arguments: None,
            launch_metadata=lambda *arguments: None,
            function=0,
            packed_metadata=(),
        )
        function.device_caches[device][0][key] = nothing
        return nothing


def compile_for_hopper(
    function: Any, signature: Any, constants: Any, options: Any, attributes: Any
) -> None:
    """Raises what Triton or ptxas says, or AssertionError: more shared memory than there is."""
    source = function.ASTSource(function, signature, constants, attributes)
    built = function.compile(source, target=HOPPER, options=options.__dict__)
    assert built.metadata.shared <= 227 << 10, (function.__name__, built.metadata.shared)


def pretend(log: Log) -> None:
    """Puts a Hopper where Triton looks for a GPU; what computes on the host is left out."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: HOPPER,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction._do_compile = lambda self, *arguments: log.build(self, *arguments)
    torch.mm = lambda x, y, out: out  # type: ignore[assignment]
    torch.addmm = lambda bias, x, y, out: out  # type: ignore[assignment]
    logits = TritonOps.logits
    TritonOps.logits = lambda self, x, w: logits(self, x, w).zero_()  # type: ignore[method-assign]
    DummySource._fill = lambda *arguments: None  # type: ignore[method-assign,assignment]
    device_sampler.token_logprobs = lambda *arguments: None
    model_runner.prompt_logprobs = lambda *arguments: ()


def make_runner(shape: str) -> tuple[ModelRunner, Rehearsal]:
    spec, family = read_spec(dict(MODELS[shape].config) | SMALLER)
    source = DummySource(weight_shapes(spec, family), "bfloat16", 0)
    ops = TritonOps(1, is_deterministic=False)
    decoder = load_decoder(spec, family, DevicePlacement(source, CPU), ops, MAX_LEN)
    groups = group_layers(spec.kv_specs(kv_formats("bfloat16")))
    limits = PlanLimits(max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN, kv_tokens=16 * NUM_BLOCKS)
    planned = build.planned_groups(decoder, groups, 16)
    planner = StepPlanner(planned, limits, chip.num_processors(CPU), min_saved_bytes=1)
    storage, transfer = KVStorage(groups, NUM_BLOCKS, 16, CPU), HostTransfer()
    sampler = DeviceSampler(spec.vocab_size, MAX_SEQS, CPU, KERNELS, transfer.upload)
    graphs = StepGraphs(is_on=False)
    equipment = device_equipment(decoder, storage, planner, sampler, graphs, transfer, MAX_LEN)
    runner = ModelRunner(decoder, storage, equipment)
    return runner, Rehearsal(runner, graphs, CPU)


class Request:
    """A sequence that shares its first blocks or none."""

    def __init__(
        self, prompt: int, output: int, params: SamplingParams, shared: list[int] | None = None
    ) -> None:
        self.prompt, self.output, self.params = prompt, output, params
        self.shared = shared or []
        self.blocks = list(self.shared)
        self.computed = 16 * len(self.blocks)
        self.row = -1
        self.told = 0


class Engine:
    """As much of a scheduler as it takes: whoever runs decodes, the rest of the step is prompts."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.rows = list(range(MAX_SEQS))
        self.blocks = list(range(1, NUM_BLOCKS))
        self.freed: list[int] = []
        self.step_id = 1

    def run(self, requests: list[Request], arrivals: Iterator[int] | None = None) -> None:
        waiting, running = list(requests), []
        while waiting or running:
            for request in [r for r in running if r.computed >= r.prompt + r.output]:
                running.remove(request)
                self.freed.append(request.row)
                self.rows.append(request.row)
                self.blocks += request.blocks[len(request.shared) :]
            for _ in range(MAX_SEQS if arrivals is None else next(arrivals)):
                if waiting and self.rows and sum(r.prompt for r in running) < 8 * NUM_BLOCKS:
                    running.append(waiting.pop(0))
                    running[-1].row = self.rows.pop()
            chunks, left = [], MAX_TOKENS
            for request in running:
                count = min(left, max(1, request.prompt - request.computed))
                if count:
                    chunks.append((request, count))
                    left -= count
            if chunks:
                self.step(chunks)

    def step(self, chunks: list[tuple[Request, int]]) -> None:
        deltas, starts = [], []
        for request, count in chunks:
            if request.told == 0:
                starts.append(
                    RowStart(
                        row=request.row,
                        params=request.params,
                        seed=0,
                        stop_token_ids=(),
                        prompt_len=request.prompt,
                        token_ids=np.zeros(request.prompt, np.int32),
                    )
                )
            while 16 * len(request.blocks) < request.computed + count:
                request.blocks.append(self.blocks.pop())
            ids = np.array(request.blocks[request.told :], np.int32)
            deltas.append(row_delta(0, request.row, request.told, ids))
            request.told = len(request.blocks)
        counts = [count for _, count in chunks]
        ends = [r.computed + count for r, count in chunks]
        plan = StepPlan(
            step_id=self.step_id,
            rows=np.array([r.row for r, _ in chunks], np.int32),
            starts=np.array([r.computed for r, _ in chunks], np.int32),
            query_lens=np.array(counts, np.int32),
            token_ids=np.ones(sum(counts), np.int32),
            from_device=np.array([r.computed >= r.prompt for r, _ in chunks]),
            purposes=token_purposes(
                np.array([e >= r.prompt for e, (r, _) in zip(ends, chunks, strict=True)])
            ),
            row_starts=tuple(starts),
            freed_rows=tuple(self.freed),
            table_deltas=tuple(deltas),
        )
        self.freed.clear()
        self.step_id += 1
        self.runner.collect(self.runner.launch(plan))
        for (request, _), end in zip(chunks, ends, strict=True):
            request.computed = end


def walk(engine: Engine, log: Log) -> None:
    """Takes the engine through what users do."""
    rng = random.Random(0)
    drawn = SamplingParams(temperature=1.0)

    def run(phase: str, requests: list[Request], arrivals: Iterator[int] | None = None) -> None:
        log.phase = phase
        engine.run(requests, arrivals)

    run("alone", [Request(512, 20, drawn)])
    run("short", [Request(37, 5, drawn)])
    run("long", [Request(MAX_LEN - 8, 5, drawn)])
    run("32", [Request(512, 20, drawn) for _ in range(32)])
    prefix = [engine.blocks.pop() for _ in range(256)]
    for count in (1, 32):
        run("hit", [Request(4096 + 100, 20, drawn, prefix) for _ in range(count)])
    lengths = lambda: (rng.randint(5, 1000), rng.randint(5, 120))
    run("mixed", [Request(*lengths(), drawn) for _ in range(160)])
    arrivals = iter(lambda: int(rng.random() < 0.3), -1)
    run("arriving", [Request(*lengths(), drawn) for _ in range(80)], arrivals)
    for name, more in {
        "top": {"top_k": 40, "top_p": 0.9},
        "min_p": {"min_p": 0.1},
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2},
        "logprobs": {"logprobs": 3},
        "prompt_logprobs": {"prompt_logprobs": 1},
        "bias": {"logit_bias": {3: 1.0}},
        "allowed": {"allowed_token_ids": (3, 4)},
    }.items():
        params = SamplingParams(temperature=0.8, **more)  # type: ignore[arg-type]
        for lengths_of in ((100,), (33, 200), (40,) * 8):
            run(name, [Request(length, 3, params) for length in lengths_of])
    run("greedy", [Request(9, 3, SamplingParams(temperature=0.0))])


def main(shape: str, *, is_built: bool) -> None:
    log = Log()
    pretend(log)
    runner, rehearsal = make_runner(shape)
    config = EngineConfig(model="none", max_num_seqs=MAX_SEQS).resolve()
    plan: Any = SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_model_len=MAX_LEN)
    build.warm_up(rehearsal, config, plan, runner.decoder.spec, building, 2)
    if is_built:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda asked: compile_for_hopper(*asked), log.asked))
    else:
        walk(Engine(runner), log)


assert not triton.knobs.runtime.interpret
if __name__ == "__main__":
    main(sys.argv[1], is_built="--build" in sys.argv)
