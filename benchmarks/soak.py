"""Full load for minutes on one engine core, to see whether anything is lost or grows.

    python benchmarks/soak.py MODEL [--seconds 300] [--layers N] [engine options]
    python benchmarks/soak.py tiny --seconds 10 --num-threads 1

MODEL is a named shape of octavo/cli/bench/shapes.py, `tiny`, or any model. Requests of random
length, priority and sampling arrive faster than they can be served, some share prefixes, some are
cancelled at a random moment, and the KV cache is too small for those that run, so that sequences
are preempted all the time. At the end the engine runs empty. Prints one JSON object; exits with 1
if a request was lost or failed, a count is wrong, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from octavo import LLM, SamplingParams
from octavo.cli.bench.shapes import engine_values
from octavo.cli.bench.workload import positive
from octavo.cli.options import Parser, add_options, config_values
from octavo.config import EngineConfig
from octavo.errors import OverloadedError
from octavo.formats import kv_formats
from octavo.models.registry import read_spec
from octavo.request import FinishReason, Request, TokenDelta, pack_ids
from octavo.weights.hub import resolve_model

TINY: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "float32",
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 512,
}
KV_SEQUENCES = 3
"""Sequences of full length that the KV cache holds, unless --kv-cache-memory says more."""
CHECK_EVERY = 200
"""Steps between two checks of all invariants under load."""
SETTLED_SHARE = 0.2
"""Of the time after which memory may grow no more than by MAX_GROWTH_BYTES."""
MAX_GROWTH_BYTES = 64 * 2**20


@dataclass(slots=True)
class Open:
    """A request whose sequences have not all ended."""

    max_tokens: int
    cancel_after: int | None
    """Step at which it is cancelled; None: it runs to its end."""
    is_cancelled: bool = False
    num_tokens: dict[int, int] = field(default_factory=dict)
    """Of each sequence that has not ended, by its index."""


class Soak:
    """Feeds the core of one LLM and keeps account of what becomes of every sequence."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._core = llm.core
        self._vocab = llm.spec.vocab_size
        self._longest = llm.plan.max_model_len
        self._max_open = 2 * llm.config.max_num_seqs
        self._rng = random.Random(seed)
        self._prefixes = [self._ids(self._longest // 4) for _ in range(4)]
        self._open: dict[str, Open] = {}
        self._num_steps = 0
        self.num_requests = 0
        self.num_sequences = 0
        self.ends: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()

    def run(self, is_over: Callable[[], bool]) -> None:
        """Keeps the engine full until `is_over`, then lets it run empty."""
        while not is_over():
            for _ in range(min(self._max_open - len(self._open), self._rng.randint(0, 4))):
                self._add()
            self._step()
        silent = 0
        while self._open and silent < 1000:
            silent = 0 if self._step() else silent + 1
        self.problems["sequences lost"] += sum(len(o.num_tokens) for o in self._open.values())
        self._check()

    def _add(self) -> None:
        rng = self._rng
        name = f"soak-{self.num_requests}"
        prompt = self._ids(rng.randint(1, self._longest // 2))
        if rng.random() < 0.3:
            prompt = rng.choice(self._prefixes) + prompt[: self._longest // 4]
        max_tokens = rng.randint(1, self._longest // 4)
        params = self._params(max_tokens)
        request = Request(
            request_id=name,
            packed_prompt=pack_ids(prompt),
            params=params,
            priority=rng.choice((0, 0, 0, 1, -1)),
        )
        try:
            self._core.add(request)
        except OverloadedError:
            return
        self.num_requests += 1
        self.num_sequences += params.n
        cancel_after = self._num_steps + rng.randint(0, 200) if rng.random() < 0.15 else None
        self._open[name] = Open(
            max_tokens, cancel_after, num_tokens=dict.fromkeys(range(params.n), 0)
        )

    def _params(self, max_tokens: int) -> SamplingParams:
        rng = self._rng
        kinds: tuple[dict[str, Any], ...] = (
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 1.0, "n": 2},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": rng.randrange(2**31)},
            {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5},
            {"temperature": 1.0, "logprobs": 2, "repetition_penalty": 1.1},
        )
        kind = rng.choices(kinds, weights=(4, 8, 1, 2, 1, 1))[0]
        return SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **kind)

    def _ids(self, length: int) -> list[int]:
        return self._rng.choices(range(self._vocab), k=length)

    def _step(self) -> bool:
        """Cancels what is due and runs a step; returns whether there was news of a sequence."""
        for name, request in self._open.items():
            due = request.cancel_after is not None and self._num_steps >= request.cancel_after
            if due and not request.is_cancelled:
                request.is_cancelled = True
                self._core.abort(name)
        deltas = self._core.step()
        for delta in deltas:
            self._note(delta)
        self._num_steps += 1
        if self._num_steps % CHECK_EVERY == 0:
            self._check()
        return bool(deltas)

    def _note(self, delta: TokenDelta) -> None:
        request = self._open.get(delta.request_id)
        if request is None or delta.index not in request.num_tokens:
            self.problems["news of a sequence that had ended"] += 1
            return
        request.num_tokens[delta.index] += len(delta.token_ids)
        if any(not 0 <= token < self._vocab for token in delta.token_ids):
            self.problems["tokens outside the vocabulary"] += 1
        reason = delta.finish_reason
        if reason is None:
            return
        made = request.num_tokens.pop(delta.index)
        self.ends[reason.value] += 1
        if reason is FinishReason.LENGTH and made != request.max_tokens:
            self.problems["sequences of a wrong length"] += 1
        if reason is FinishReason.ERROR:
            self.problems[f"error: {delta.stop_reason}"] += 1
        if reason is FinishReason.ABORT and not request.is_cancelled:
            self.problems["sequences that nobody cancelled"] += 1
        if not request.num_tokens:
            del self._open[delta.request_id]

    def _check(self) -> None:
        try:
            self._core.check()
        except AssertionError as error:
            self.problems[f"check: {error}"] += 1


class MemoryWatch:
    """Memory of this process when the load has settled, against its end."""

    def __init__(self) -> None:
        self._settled: dict[str, int] | None = None

    def settle(self) -> None:
        """Takes the first figures; later calls do nothing."""
        self._settled = self._settled or memory_bytes()

    def growth(self) -> dict[str, int]:
        """Returns how many bytes each kind of memory has grown since."""
        now, settled = memory_bytes(), self._settled or {}
        return {name: size - settled.get(name, size) for name, size in now.items()}


def memory_bytes() -> dict[str, int]:
    """Returns the resident bytes of this process and what torch holds on the GPU, if any."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = {"rss": pages * os.sysconf("SC_PAGE_SIZE")}
    if torch.cuda.is_available():
        sizes["device_allocated"] = torch.cuda.memory_allocated()
    return sizes


def soak(llm: LLM, *, seconds: float, max_requests: int | None, seed: int) -> dict[str, Any]:
    """Returns the account of a run that ends after `seconds` or `max_requests`."""
    load, memory, before = Soak(llm, seed), MemoryWatch(), llm.stats()
    began = time.monotonic()

    def is_over() -> bool:
        done = (time.monotonic() - began) / seconds
        if max_requests is not None:
            done = max(done, load.num_requests / max_requests)
        if done >= SETTLED_SHARE:
            memory.settle()
        return done >= 1

    load.run(is_over)
    passed, stats, growth = time.monotonic() - began, llm.stats(), memory.growth()
    problems = +load.problems
    grown = {name: size for name, size in growth.items() if size > MAX_GROWTH_BYTES}
    problems.update({f"bytes that {name} grew by": size for name, size in grown.items()})
    if sum(load.ends.values()) != load.num_sequences:
        problems["sequences without exactly one end"] += 1
    if stats.num_used_blocks or stats.num_running or stats.num_waiting:
        problems["blocks or sequences left in an idle engine"] += 1
    if stats.num_preemptions == before.num_preemptions:
        problems["no preemption: the KV cache is too large for this load"] += 1
    return {
        "ok": not problems,
        "problems": dict(problems),
        "seconds": round(passed, 1),
        "requests": load.num_requests,
        "sequences": load.num_sequences,
        "ends": dict(load.ends),
        "output_tokens_per_second": round(
            (stats.num_generation_tokens - before.num_generation_tokens) / passed, 1
        ),
        "steps": stats.num_steps - before.num_steps,
        "preemptions": stats.num_preemptions - before.num_preemptions,
        "recomputed_tokens": stats.num_recomputed_tokens - before.num_recomputed_tokens,
        "cached_prompt_tokens": stats.num_cached_prompt_tokens - before.num_cached_prompt_tokens,
        "kv_tokens": llm.plan.num_tokens,
        "growth_bytes": growth,
        "memory_bytes": memory_bytes(),
    }


def load_llm(model: str, given: dict[str, Any], layers: int | None, folder: Path) -> LLM:
    """Returns an engine whose context and KV cache are small, where `given` does not say more."""
    if model == "tiny":
        (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
        defaults = {"load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 16}
        values = {**engine_values(str(folder), defaults, folder, layers), **given}
    else:
        values = engine_values(
            model, {"max_model_len": 2048, "max_num_seqs": 64, **given}, folder, layers
        )
    if "kv_cache_memory_bytes" not in values:
        values["kv_cache_memory_bytes"] = small_kv_bytes(EngineConfig(**values))
    return LLM(**values)


def small_kv_bytes(config: EngineConfig) -> int:
    """Returns bytes for a few sequences of full length (twice that where KV is in 16 bits)."""
    files = resolve_model(config.model, load_format=config.load_format)
    spec, _ = read_spec(files.config)
    name = "float32" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    token_bytes = sum(kv.token_bytes for kv in spec.kv_specs(kv_formats(name)))
    length = config.max_model_len or spec.default_len
    return (KV_SEQUENCES * length + 2 * config.block_size) * token_bytes


def main() -> int:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--requests", type=positive, help="stop after so many")
    parser.add_argument("--layers", type=positive, help="cut a named shape")
    parser.add_argument("--load-seed", type=int, default=0)
    add_options(parser, EngineConfig)
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="octavo-soak-") as folder:
        llm = load_llm(args.model, config_values(args, EngineConfig), args.layers, Path(folder))
        account = soak(llm, seconds=args.seconds, max_requests=args.requests, seed=args.load_seed)
        llm.close()
    print(json.dumps(account, indent=2))
    return 0 if account["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
