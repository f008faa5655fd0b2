"""GPUs of one host beside one: sums, speed and equal tokens of every layout.

    python -m benchmarks.tensor_parallel [--stages check,times,engines,tokens] [--seconds 360]
        [--model qwen3-30b-a3b] [--layers N] [--size 2] [--layouts one,library,peers,experts]

Layouts: `one` GPU; --size of them with their sums through the `library` (NCCL) or through each
other's memory (`peers`); those that have whole `experts`, with the latter sums. Stages: `check`
and `times` of sums are benchmarks/peers.py; `engines` are the workloads D1, D32 and P of `octavo
bench workloads` (with `--only D1,D32,P,K` their kernels, too), `prompts` times to a first token, of
all GPUs; `tokens` are greedy ones of two layers, of few experts and ids, in float32, which must be
those of one GPU. Weights are random.

Every stage is a process with a time-out, and prints as it comes. At the end a table and a JSON
object; exits with 1 if something was wrong or did not end. After --seconds no stage begins.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "peers": {},
    "experts": {"enable_expert_parallel": True},
    "library": {},
}
STAGE_SECONDS = {"check": 100, "times": 100, "engines": 180, "prompts": 120, "tokens": 90}
WORKLOADS = "D1,D32,P"
SHOWN = ("D1", "D32", "P 8192", "P 32768")
PROMPTS = (256, 512, 1024, 2048, 3000, 4096, 8192, 32768)
PROMPT_RUNS = 7
TOKENS_LAYERS, PROMPT_LENGTH, NUM_PROMPTS, NUM_TOKENS = 2, 100, 8, 32
TOKENS_CUT = {"vocab_size": 4096, "num_experts": 16, "bos_token_id": 1, "eos_token_id": 2}
"""Of the model's config, so that its random weights are soon made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a stage's process came to."""

    objects: list[dict[str, Any]]
    """The JSON objects among its lines."""
    is_well: bool


def run_stage(name: str, command: list[str], seconds: float) -> Done:
    """Runs a Python module, printing its lines as they come."""
    began = time.perf_counter()
    print(f"== {name}: {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    objects: list[dict[str, Any]] = []
    watch = subprocess.Popen(  # ends the stage and all that it has started
        [
            sys.executable,
            "-c",
            f"import time, os; time.sleep({seconds}); os.killpg({process.pid}, 9)",
        ]
    )
    for line in process.stdout:
        if line.startswith("{"):
            objects.append(json.loads(line))
        print(line, end="", flush=True)
    code = process.wait()
    watch.kill()
    how = "well" if code == 0 else f"with {signal.Signals(-code).name if code < 0 else code}"
    print(f"== {name} ended {how} after {time.perf_counter() - began:.0f} s", flush=True)
    return Done(objects=objects, is_well=code == 0)


def without_peers() -> None:
    """Has the ranks of this process's engines sum through the library: all do if one must."""
    from octavo.parallel import TorchCollectives

    reach = TorchCollectives.unreachable
    TorchCollectives.unreachable = lambda self: reach(self) or "the library is asked for"


def options_of(layout: str, size: int) -> dict[str, Any]:
    """Returns the engine's options; has this process leave out what a layout has not."""
    if layout == "library":
        without_peers()
    return {"tensor_parallel_size": 1 if layout == "one" else size, **LAYOUTS[layout]}


def run_engine(model: str, layout: str, size: int, layers: int | None, only: str) -> int:
    """Runs the workloads in this process."""
    from octavo.cli import main

    asked = options_of(layout, size)
    options = ["bench", "workloads", model, "--only", only]
    options += ["--tensor-parallel-size", str(asked["tensor_parallel_size"])]
    if asked.get("enable_expert_parallel"):
        options.append("--enable-expert-parallel")
    if layers is not None:
        options += ["--layers", str(layers)]
    return main(options)


def run_prompts(model: str, layout: str, size: int, layers: int | None, device: str) -> int:
    """Prints what one cold prompt after the other takes, in milliseconds."""
    from octavo.cli.bench.offline import measure
    from octavo.cli.bench.shapes import engine_values, fixed_prompts
    from octavo.llm import LLM

    values = {"load_format": "dummy", "device": device, **options_of(layout, size)}
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        llm = LLM(**engine_values(model, values, Path(folder), layers))
    figures: dict[str, Any] = {"unit": "ms"}
    try:
        for number, length in enumerate(one for one in PROMPTS if one < llm.plan.max_model_len):
            found: list[float] = []
            for run in range(PROMPT_RUNS):
                prompts = fixed_prompts(llm.vocab_size, 1, length, 1000 * number + run)
                found.append(1e3 * measure(llm, prompts, [1], temperature=1.0).seconds)
            figures[str(length)] = {"median": statistics.median(found), "repeats": found}
            print(f"prompt of {length:5}: {statistics.median(found):8.1f} ms, first {found[0]:.1f},"
                  f" best {min(found):.1f}", flush=True)  # fmt: skip
    finally:
        llm.close()
    print(json.dumps({"name": "prompts", "figures": figures}))
    return 0


def run_tokens(model: str, layout: str, size: int, device: str) -> int:
    """Prints the greedy tokens of some prompts as a JSON object."""
    from octavo import LLM, SamplingParams
    from octavo.cli.bench.shapes import fixed_prompts, write_model

    options = options_of(layout, size)
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        write_model(model, Path(folder), TOKENS_LAYERS)
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | TOKENS_CUT))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            device=device,
            max_model_len=512,
            max_num_seqs=NUM_PROMPTS,
            max_num_batched_tokens=PROMPT_LENGTH * NUM_PROMPTS,
            prefix_caching="off",
            kv_cache_memory_bytes=2**28,
            **options,
        )
    try:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        prompts = fixed_prompts(llm.vocab_size, NUM_PROMPTS, PROMPT_LENGTH, 0)
        found = llm.generate(prompts, params, use_tqdm=False)
        alone = llm.generate(prompts[:1], params, use_tqdm=False)  # a lone row's kernels
    finally:
        llm.close()
    print(json.dumps({"tokens": [one.outputs[0].token_ids for one in (*found, *alone)]}))
    return 0


class Run:
    """The stages asked for, and what they have told."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._began = time.perf_counter()
        self._layouts: list[str] = arguments.layouts.split(",")
        self.report: dict[str, Any] = {"model": arguments.model, "layers": arguments.layers}
        self.is_wrong = False

    def run(self, stage: str) -> None:
        if stage in ("check", "times"):
            size = str(self._arguments.size)
            done = self._stage(stage, stage, ["benchmarks.peers", stage, "--size", size])
            for one in done.objects:
                self.report |= one
            return
        for layout in self._layouts:
            name = f"{stage} {layout}"
            command = ["benchmarks.tensor_parallel", "--run", stage, "--layouts", layout]
            command += ["--model", self._arguments.model, "--device", self._arguments.device]
            command += ["--only", self._arguments.only, "--size", str(self._arguments.size)]
            if self._arguments.layers is not None:
                command += ["--layers", str(self._arguments.layers)]
            if stage != "tokens" and layout == "one":
                continue
            done = self._stage(stage, name, command)
            for one in done.objects:
                if stage == "tokens":
                    self._compare(layout, one["tokens"])
                else:
                    self.report.setdefault(layout, {})[one["name"]] = one["figures"]

    def _stage(self, stage: str, name: str, command: list[str]) -> Done:
        left = self._arguments.seconds - (time.perf_counter() - self._began)
        if left <= 0:
            print(f"== {name} is left out: the time is up", flush=True)
            return Done(objects=[], is_well=False)
        done = run_stage(name, command, min(STAGE_SECONDS[stage], left + 30))
        self.is_wrong |= not done.is_well
        return done

    def _compare(self, layout: str, tokens: list[list[int]]) -> None:
        wanted = self.report.setdefault("tokens", tokens)
        self.report.setdefault("equal_tokens", {})[layout] = tokens == wanted
        self.is_wrong |= tokens != wanted
        print(f"tokens of {layout}: {'equal' if tokens == wanted else 'WRONG'}", flush=True)

    def print_report(self) -> None:
        self.report.pop("tokens", None)
        for name in SHOWN:
            found = {one: self.report[one][name] for one in self._layouts
                     if name in self.report.get(one, {})}  # fmt: skip
            cells = (f"{one} {value['median']} {value['unit']}" for one, value in found.items())
            print(f"{name:8} {' | '.join(cells)}")
        print(json.dumps(self.report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default="check,times,engines,tokens")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a shape of octavo bench")
    parser.add_argument("--layers", type=int, default=None, help="of engines; default: all")
    parser.add_argument("--size", type=int, default=2, help="GPUs")
    parser.add_argument("--only", default=WORKLOADS, help="workloads of engines")
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--run", choices=("engines", "prompts", "tokens"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    own = arguments.model, arguments.layouts, arguments.size
    if arguments.run == "engines":
        return run_engine(*own, arguments.layers, arguments.only)
    if arguments.run == "prompts":
        return run_prompts(*own, arguments.layers, arguments.device)
    if arguments.run == "tokens":
        return run_tokens(*own, arguments.device)
    run = Run(arguments)
    for stage in arguments.stages.split(","):
        run.run(stage)
    run.print_report()
    return int(run.is_wrong)


if __name__ == "__main__":
    sys.exit(main())
