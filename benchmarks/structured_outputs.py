"""Many outputs held to many JSON schemas: is each that ends valid, is each that is cut a beginning?

    python -m benchmarks.structured_outputs --outputs 10000
    python -m benchmarks.structured_outputs --model demo --outputs 1000

The schemas are those of a public test suite (npm's json-schema-test-suite) and random ones. Without
`--model` the outputs are a tiny model's of random weights, whose logits prefer the ends of texts so
that they end at all: the adversary. Prints one JSON line; what is wrong goes to stderr, and ends
with 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs
from hypothesis import HealthCheck, Phase, given, seed, settings

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.errors import RequestError
from octavo.grammar import Matcher, Vocabulary, grammar_text
from octavo.grammar.compiler import Compiler
from octavo.outputs import RequestOutput
from tests.grammar.test_json import SCHEMAS, SUITE
from tests.server.tiny_engine import write_model

BATCH = 512
MAX_TO_END = 4000
"""Bytes that may follow what was cut, until it is whole."""
ENDS = 8.0
"""What ends of texts have over all other tokens, in a model of random weights."""
ATTEMPTS = 8
PROMPT = "Write what fits this JSON schema, nothing else: "


def suite_schemas() -> list[Any]:
    """Returns the schemas of the public test suite, by npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", SUITE], cwd=folder, check=True, stdout=sys.stderr
        )
        (archive,) = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        paths = sorted(Path(folder, "package", "tests", "draft4").glob("*.json"))
        return [case["schema"] for path in paths for case in json.loads(path.read_text())]


def as_draft_4(schema: Any) -> Any:
    """Returns a schema that says which draft it is of, as its judge needs it."""
    return {"$schema": "http://json-schema.org/draft-04/schema#", **schema}


def random_schemas(number: int, base: int) -> list[Any]:
    found: list[Any] = []

    @seed(base)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect(schema: Any) -> None:
        found.append(schema)

    collect()
    return found


@dataclass(kw_only=True)
class Report:
    schemas: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    outputs: int = 0
    ended: int = 0
    cut: int = 0
    tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def line(self, given: argparse.Namespace) -> dict[str, Any]:
        return {
            "benchmark": "structured_outputs",
            "model": given.model or "tiny, random weights",
            "max_tokens": given.max_tokens,
            "schemas": self.schemas,
            "refused_schemas": sum(self.refused.values()),
            "refused": dict(self.refused.most_common()),
            "outputs": self.outputs,
            "ended": self.ended,
            "ended_share": round(self.ended / max(1, self.outputs), 4),
            "cut_and_whole_later": self.cut,
            "wrong": len(self.wrong),
            "mean_tokens": round(self.tokens / max(1, self.outputs), 1),
        }


class Judge:
    """Says what is wrong with outputs, by a library that has nothing to do with the engine's."""

    def __init__(self) -> None:
        vocabulary = Vocabulary.of_bytes({})
        self._vocabulary = vocabulary
        self._compiler = Compiler(lambda: vocabulary, len(vocabulary.tokens))

    def matcher(self, schema: Any) -> Matcher:
        return self._compiler.compile(grammar_text(StructuredOutputsParams(json=schema)))

    def fault(self, schema: Any, text: str, is_cut: bool) -> str:
        """Returns what is wrong; empty: nothing."""
        if is_cut:
            beginning = text.rstrip("\ufffd")
            ways = (self._completed(schema, beginning, random.Random(n)) for n in range(ATTEMPTS))
            whole = next((one for one in ways if one is not None), None)
            if whole is None:
                return "cut, and nothing makes it whole"
            text = whole
        try:
            value = json.loads(text)
        except ValueError as error:
            return f"no JSON: {error}"
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        return "" if validator.is_valid(value) else "not valid"

    def _completed(self, schema: Any, text: str, chance: random.Random) -> str | None:
        """Returns a whole text that begins with `text`, by the first way to its end that is found;
        what a pattern still wants is guessed from the schema's own letters."""
        matcher, hints = self.matcher(schema), json.dumps(schema).encode()
        ids = self._vocabulary.encode(text)
        if matcher.accepts(ids) < len(ids):
            return None
        matcher.advance(ids)
        data = bytearray(text.encode())
        first = len(self._vocabulary.tokens) - 256
        for _ in range(MAX_TO_END):
            if matcher.can_end:
                return data.decode()
            words = self._compiler.masks([matcher])[0]
            ids = [first + one for one in range(256)]
            allowed = [one - first for one in ids if words[one // 32] >> (one % 32) & 1]
            byte = _next(allowed, data, hints, chance)
            matcher.advance([first + byte])
            data.append(byte)
        return None


def _next(allowed: Sequence[int], data: bytes, hints: bytes, chance: random.Random) -> int:
    ways = (
        [one for one in allowed if chr(one) in '"}]'],
        [one for one in allowed if one in data[-1:]],
        [one for one in allowed if one in hints],
        allowed,
    )
    (way,) = chance.choices(ways, weights=(4, 2, 2, 1))
    return chance.choice(way or allowed)


class Writer:
    """A model, and how it is asked."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        options: dict[str, Any] = {"max_num_seqs": given.rows, "num_threads": given.threads}
        if given.model:
            self._llm = LLM(given.model, max_model_len=2048, **options)
        else:
            self._llm = LLM(
                str(write_model(folder)), load_format="dummy", dtype="float32", **options
            )
        self._is_random = not given.model
        self._max_tokens = given.max_tokens
        tokenizer = self._llm.get_tokenizer()
        size = tokenizer.vocab_size
        self._bias = {
            token_id: ENDS
            for token_id in range(size)
            if tokenizer.token_bytes(token_id).strip() in (b'"', b"}", b"]", b'"}', b'"]')
        }
        self._bias |= dict.fromkeys(self._llm._input.eos_token_ids, ENDS)

    def write(self, schemas: Sequence[Any], first_seed: int) -> list[RequestOutput]:
        params = [
            SamplingParams(
                max_tokens=self._max_tokens,
                temperature=1.0,
                seed=first_seed + place,
                logit_bias=self._bias if self._is_random else None,
                structured_outputs=StructuredOutputsParams(json=schema),
            )
            for place, schema in enumerate(schemas)
        ]
        if self._is_random:
            return self._llm.generate(["x"] * len(schemas), params, use_tqdm=False)
        chats = [[{"role": "user", "content": PROMPT + json.dumps(one)[:1000]}] for one in schemas]
        return self._llm.chat(chats, params, use_tqdm=False)


def usable(schemas: Sequence[Any], judge: Judge, report: Report) -> list[Any]:
    """Returns the schemas that outputs can be held to; the others are counted by reason."""
    found = []
    for schema in schemas:
        report.schemas += 1
        try:
            judge.matcher(schema)
        except RequestError as error:
            report.refused[str(error).partition(": ")[2][:100]] += 1
        else:
            found.append(schema)
    return found


def batches(schemas: Sequence[Any], outputs: int) -> Iterator[list[Any]]:
    endless = itertools.islice(itertools.cycle(schemas), outputs)
    while batch := list(itertools.islice(endless, BATCH)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a tiny one of random weights if not given")
    parser.add_argument("--outputs", type=int, default=10_000)
    parser.add_argument("--schemas", type=int, default=2_000, help="random ones")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    judge, report = Judge(), Report()
    random_ones = random_schemas(given.schemas, given.seed)
    schemas = usable([*map(as_draft_4, suite_schemas()), *random_ones], judge, report)
    random.Random(given.seed).shuffle(schemas)
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(given, Path(folder))
        for batch in batches(schemas, given.outputs):
            for schema, output in zip(batch, writer.write(batch, report.outputs), strict=True):
                (one,) = output.outputs
                is_cut = one.finish_reason == "length"
                report.outputs += 1
                report.tokens += len(one.token_ids)
                report.cut += is_cut
                report.ended += one.finish_reason == "stop"
                if fault := judge.fault(schema, one.text, is_cut):
                    report.wrong.append({"schema": schema, "text": one.text, "fault": fault})
            print(report.outputs, report.ended, report.cut, file=sys.stderr, flush=True)
    for wrong in report.wrong[:20]:
        print(json.dumps(wrong, ensure_ascii=False), file=sys.stderr)
    print(json.dumps(report.line(given)))
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
