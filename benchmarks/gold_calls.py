"""Gold calls of the Berkeley function-calling benchmark through every format: written as models
write them, streamed in random pieces, read back. All must be equal.

    python -m benchmarks.gold_calls [--wheel FILE] [--limit N] [--seed S] > gold_calls.jsonl

Without --wheel the package `bfcl-eval` is downloaded, without its dependencies, into a temporary
folder; nothing of it is installed. Prints a line a format and exits with 1 where a call differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tools.rendering import RENDERINGS, Call, Rendering, read

SETS = (
    *("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple"),
    *("live_multiple", "live_parallel", "live_parallel_multiple"),
)
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "", "bool": "boolean"}
_TYPES |= {"int": "integer", "list": "array", "str": "string"}


def fetch(folder: Path) -> Path:
    """Downloads the package's wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "bfcl-eval"]
    subprocess.run([*command, "--dest", str(folder)], check=True, stdout=sys.stderr)
    return next(folder.glob("bfcl_eval-*.whl"))


def gold_calls(wheel: Path) -> Iterator[tuple[str, list[Call], dict[str, Any]]]:
    """Yields each task's id, the calls that are right, and the schemas of its tools by name."""
    with zipfile.ZipFile(wheel) as archive:
        for name in SETS:
            tasks = _lines(archive, f"bfcl_eval/data/BFCL_v4_{name}.json")
            answers = _lines(archive, f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json")
            truth = {one["id"]: one["ground_truth"] for one in answers}
            for task in tasks:
                schemas = {
                    _name(one["name"]): _schema(one["parameters"]) for one in task["function"]
                }
                calls = [
                    (_name(function), {key: _first(value) for key, value in given.items() if value})
                    for call in truth[task["id"]]
                    for function, given in call.items()
                ]
                yield task["id"], [(one, _present(given)) for one, given in calls], schemas


def _lines(archive: zipfile.ZipFile, member: str) -> list[Any]:
    return [json.loads(line) for line in archive.read(member).decode().splitlines() if line]


def _name(name: str) -> str:
    return name.replace(" ", "_")


def _first(choices: Any) -> Any:
    """Returns the first of the values that are right; objects have such lists within."""
    value = choices[0] if isinstance(choices, list) else choices
    if isinstance(value, dict):
        return _present({key: _first(one) for key, one in value.items()})
    if isinstance(value, list):
        return [_inner(one) for one in value]
    return value


def _inner(value: Any) -> Any:
    """Returns an item of a list, which is no list of choices, though its fields may be."""
    if not isinstance(value, dict):
        return value
    return _present({key: _first(one) for key, one in value.items() if one != []})


def _present(given: dict[str, Any]) -> dict[str, Any]:
    """Without what may be left out, which is spelled as an empty text."""
    return {key: value for key, value in given.items() if value != ""}


def _schema(given: Any) -> Any:
    """Returns a JSON schema of what the benchmark has, whose types are Python's."""
    if isinstance(given, list):
        return [_schema(one) for one in given]
    if not isinstance(given, dict):
        return given
    schema = {key: _schema(value) for key, value in given.items()}
    kind = given.get("type")
    if isinstance(kind, str):
        schema["type"] = _TYPES.get(kind, kind)
        if not schema["type"]:
            del schema["type"]
    return schema


def is_writable(row: Rendering, calls: list[Call], schemas: dict[str, Any]) -> bool:
    """Whether a format can say the calls at all: where values are plain text, the schema must tell
    a text from what it spells."""
    if not row.is_typed:
        return True
    return all(
        _agrees(value, schemas.get(name, {}).get("properties", {}).get(key, {}))
        for name, given in calls
        for key, value in given.items()
    )


def _agrees(value: Any, schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    if isinstance(value, str):
        return kind == "string" and value == value.strip("\n")
    if isinstance(value, list):
        items = schema.get("items", {})
        return kind == "array" and all(_agrees(one, items) for one in value)
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        return kind == "object" and all(_agrees(v, inner.get(k, {})) for k, v in value.items())
    kinds = {bool: ("boolean",), int: ("integer", "number"), float: ("number", "integer")}
    return kind in kinds.get(type(value), ())


def pieces_of(text: str, rng: random.Random) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = rng.choice((1, 1, 2, 3, 4, 6, 12, 30))
        pieces.append(text[at : at + size])
        at += size
    return pieces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--limit", type=int, help="tasks at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks = list(gold_calls(given.wheel or fetch(Path(folder))))[: given.limit]
    failed = 0
    for name, row in RENDERINGS.items():
        rng = random.Random(given.seed)
        counts = {"tasks": 0, "calls": 0, "unwritable_tasks": 0, "different_tasks": 0}
        first: dict[str, Any] | None = None
        for task, calls, schemas in tasks:
            if not is_writable(row, calls, schemas):
                counts["unwritable_tasks"] += 1
                continue
            counts["tasks"] += 1
            counts["calls"] += len(calls)
            text = row.write(calls) if calls else ""
            answer = read(row.parser, pieces_of(text, rng), schemas=schemas)
            if answer.content or answer.calls != calls:
                counts["different_tasks"] += 1
                first = first or {"task": task, "text": text, "read": answer.said}
        failed += counts["different_tasks"]
        line = {"format": name, "seed": given.seed, **counts, "first_difference": first}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
