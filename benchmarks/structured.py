"""What holding outputs to a form costs: steps with and without it, and a new schema's first token.

Prints one JSON line. Both kinds of steps alternate, round by round, on the same engine, so that a
busy machine slows both; `--cpu-only` prints CPU times of forms alone, without an engine. A model
that is the name of a public shape has random weights, and a vocabulary as large as its own.

    python -m benchmarks.structured --model demo --rows 8
    python -m benchmarks.structured --model qwen3-30b-a3b --rows 32 --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.large_vocabulary import write_tokenizer
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.cli.bench.shapes import MODELS, engine_values
from octavo.config import EngineConfig
from octavo.constraint import Constraint
from octavo.engine.core import EngineCore
from octavo.engine.front_end import FrontEnd
from octavo.grammar import Checker, Guide, Guides
from octavo.request import Request

NUM_CPU_TIMES = 40


def schema_of(number: int) -> dict[str, Any]:
    """A schema of ordinary size, another one for each number, whose instances go on for long."""
    item = {
        "type": "object",
        "properties": {
            f"name{number}": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "year": {"type": "integer", "minimum": 0, "maximum": 3000},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
        "required": [f"name{number}", "kind", "year", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 50}


class Bench:
    def __init__(self, llm: LLM, prompt: list[int]) -> None:
        self._llm, self._prompt = llm, prompt
        self._number = 0

    def request(self, schema: dict[str, Any] | None, max_tokens: int) -> Request:
        self._number += 1
        wanted = None if schema is None else StructuredOutputsParams(json=schema)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.8,
            seed=self._number,
            ignore_eos=True,
            structured_outputs=wanted,
            prefix_caching="off",
        )
        return self._llm._input.process(f"bench-{self._number}", self._prompt, params)

    def steps(self, schema: dict[str, Any] | None, rows: int, tokens: int) -> list[float]:
        """Returns the seconds of each step in which `rows` sequences decode."""
        core: EngineCore = self._llm.core
        for _ in range(rows):
            core.add(self.request(schema, tokens))
        seconds: list[float] = []
        while core.has_work:
            began = time.perf_counter()
            deltas = core.step()
            if len(deltas) == rows and not any(one.finish_reason for one in deltas):
                seconds.append(time.perf_counter() - began)
        return seconds[1:]

    def first_token(self, schema: dict[str, Any] | None) -> float:
        """Returns the seconds from a request's arrival to its first token, its check included."""
        core = self._llm.core
        began = time.perf_counter()
        core.add(self.request(schema, 1))
        while core.has_work:
            if core.step():
                return time.perf_counter() - began
        raise AssertionError("no token came")


def cpu_seconds(values: dict[str, Any], rows: int, number: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of what forms need beside a model: of new schemas, their check,
    compilation and first mask; of steps, the masks of `rows` sequences and their advance."""
    front_end = FrontEnd(EngineConfig(**values).resolve())
    tokenizer, chance = front_end.tokenizer, random.Random(0)
    checker = Checker(tokenizer.special_strings)
    guides = Guides(tokenizer.vocabulary, front_end.spec.vocab_size)
    checker.load()

    def guide(schema: int) -> Guide:
        wanted = StructuredOutputsParams(json=schema_of(schema))
        return guides.guide(Constraint(grammar=checker.grammar(wanted)), [0])

    found: dict[str, list[float]] = {"new_schema": [], "step": []}
    guides.masks([guide(0)], [True])  # loads the library and the vocabulary
    for schema in range(1, number + 1):
        began = time.process_time()
        guides.masks([guide(schema)], [True])
        found["new_schema"].append(time.process_time() - began)
    bound = [guide(0) for _ in range(rows)]
    for _ in range(number):
        began = time.process_time()
        masks = guides.masks(bound, [True] * rows)
        spent = time.process_time() - began
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        drawn = [int(chance.choice(np.flatnonzero(row))) for row in bits]
        began = time.process_time()
        for one, token_id in zip(bound, drawn, strict=True):
            one.advance(token_id)
        found["step"].append(spent + time.process_time() - began)
    guides.close()
    return found


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(1e3 * statistics.median(seconds), 3),
        "mean": round(1e3 * statistics.fmean(seconds), 3),
        "least": round(1e3 * min(seconds), 3),
        "most": round(1e3 * max(seconds), 3),
    }


def model_values(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the engine's options that load the model."""
    options = {"max_model_len": 1024, "max_num_seqs": max(8, given.rows)}
    if given.device is not None:
        options["device"] = given.device
    values = engine_values(given.model, options, folder, given.layers)
    if given.model in MODELS:
        write_tokenizer(folder, MODELS[given.model].config["eos_token_id"])
        values["skip_tokenizer_init"] = False
    return values


def measured(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the times of steps and of first tokens, with and without a form."""
    bench.steps(schema_of(0), given.rows, 4)  # loads the library and the vocabulary
    free: list[float] = []
    bound: list[float] = []
    for _ in range(given.rounds):
        free += bench.steps(None, given.rows, given.tokens)
        bound += bench.steps(schema_of(0), given.rows, given.tokens)
    plain = [bench.first_token(None) for _ in range(10)]
    new = [bench.first_token(schema_of(number)) for number in range(1, 11)]
    known = [bench.first_token(schema_of(1)) for _ in range(10)]
    return {
        "step_ms": {"free": milliseconds(free), "bound": milliseconds(bound)},
        "step_ratio": round(statistics.median(bound) / statistics.median(free), 4),
        "first_token_ms": {
            "without": milliseconds(plain),
            "new_schema": milliseconds(new),
            "known_schema": milliseconds(known),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device")
    parser.add_argument("--layers", type=int, help="of a public shape: so many alone")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cpu-only", action="store_true", help="no model is loaded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        values = model_values(given, Path(folder))
        report: dict[str, Any] = {
            "benchmark": "structured",
            "model": given.model,
            "rows": given.rows,
            "cpu_ms": {
                name: milliseconds(seconds)
                for name, seconds in cpu_seconds(values, given.rows, NUM_CPU_TIMES).items()
            },
        }
        if not given.cpu_only:
            llm = LLM(**values)
            llm._input.warm_up()
            bench = Bench(llm, llm.tokenizer.encode("List what you know, as JSON:"))
            report |= {"machine": platform.machine(), **measured(bench, given)}
            llm.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
