"""What holding outputs to a form costs: steps with and without it, and a new schema's first token.

Prints one JSON line. Both kinds of steps alternate, round by round, on the same engine, so that a
busy machine slows both.

    python -m benchmarks.structured --model demo --rows 8
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.engine.core import EngineCore
from octavo.request import Request


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


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(1e3 * statistics.median(seconds), 3),
        "least": round(1e3 * min(seconds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    llm = LLM(given.model, max_model_len=1024, max_num_seqs=max(8, given.rows))
    llm._input.warm_up()
    bench = Bench(llm, llm.tokenizer.encode("List what you know, as JSON:"))
    bench.steps(schema_of(0), given.rows, 4)  # loads the library and the vocabulary
    free: list[float] = []
    bound: list[float] = []
    for _ in range(given.rounds):
        free += bench.steps(None, given.rows, given.tokens)
        bound += bench.steps(schema_of(0), given.rows, given.tokens)
    plain = [bench.first_token(None) for _ in range(10)]
    new = [bench.first_token(schema_of(number)) for number in range(1, 11)]
    known = [bench.first_token(schema_of(1)) for _ in range(10)]
    report = {
        "benchmark": "structured",
        "model": given.model,
        "machine": platform.machine(),
        "rows": given.rows,
        "step_ms": {"free": milliseconds(free), "bound": milliseconds(bound)},
        "step_ratio": round(statistics.median(bound) / statistics.median(free), 4),
        "first_token_ms": {
            "without": milliseconds(plain),
            "new_schema": milliseconds(new),
            "known_schema": milliseconds(known),
        },
    }
    print(json.dumps(report))
    llm.close()


if __name__ == "__main__":
    main()
