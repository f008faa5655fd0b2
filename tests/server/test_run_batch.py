"""Files of requests without a server: `octavo run-batch`, and the run of a file beneath it."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from octavo.config import ServerConfig
from octavo.server.app import create_app
from octavo.server.batches.offline import FileRun, Progress
from tests.server.batch_jobs import CHAT, line, prompts
from tests.server.fake_engine import FakeEngine

COMMAND = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]


def run(engine: FakeEngine, path: Path) -> tuple[list[dict[str, Any]], Progress]:
    """Runs a file with an engine; returns the lines of its output."""
    output = io.BytesIO()

    async def work() -> Progress:
        state = create_app(engine, ServerConfig(max_store_bytes=0)).state.server
        return await FileRun(state, output, "batch_x").run(path)

    progress = asyncio.run(work())
    return [json.loads(one) for one in output.getvalue().splitlines()], progress


def test_each_line_has_its_answer_or_its_error_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}
    lines = [
        line("slow", {"prompt": "x", "max_tokens": 60}),
        b"{broken",
        line("chat", chat, CHAT),
        b"",
        line("slow", {"prompt": "again"}),
        line("where", {"prompt": "x"}, "/v1/nowhere"),
        line("wrong", {"prompt": "x", "temperature": -1}),
    ]
    path.write_bytes(b"\n".join(lines))
    found, progress = run(FakeEngine(), path)
    assert [one["custom_id"] for one in found] == ["slow", None, "chat", "slow", "where", "wrong"]
    codes = [one["error"] and one["error"]["code"] for one in found]
    wanted = [None, "bad_json", None, "custom_id_repeated", "invalid_value", None]
    assert codes == wanted
    statuses = [one["response"] and one["response"]["status_code"] for one in found]
    assert statuses == [200, None, 200, None, None, 400]
    assert found[2]["response"]["body"]["choices"][0]["message"]["content"]
    assert (progress.done, progress.failed) == (6, 4)


def test_many_lines_run_at_once_and_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(prompts(300))
    engine = FakeEngine()
    engine.max_num_seqs = 8
    found, progress = run(engine, path)
    assert [one["custom_id"] for one in found] == [f"id-{i}" for i in range(300)]
    assert (progress.done, progress.failed) == (300, 0)


def test_the_command_runs_a_file_and_ends(tiny_chat_model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(prompts(3) + b"\n" + line("model", {"prompt": "x", "model": "other"}))
    argv = [*COMMAND, "run-batch", "-i", str(source), "-o", str(target), "--model", tiny_chat_model]
    argv += ["--load-format=dummy", "--num-threads=1", "--kv-cache-memory=16MiB", "--device=cpu"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "4 lines" in ended.stderr
    assert "1 of them with an error" in ended.stderr
    found = [json.loads(one) for one in target.read_text().splitlines()]
    assert [one["custom_id"] for one in found] == ["id-0", "id-1", "id-2", "model"]
    assert [one["response"]["status_code"] for one in found] == [200, 200, 200, 404]
    assert {one["response"]["body"].get("object") for one in found[:3]} == {"text_completion"}


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        ("missing", "out", "--input-file"),
        ("https://host/in.jsonl", "out", "download it first"),
        ("in", "in", "is the input file"),
        ("in", "missing/out", "--output-file"),
    ],
)
def test_files_that_cannot_be_had_are_said_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    target: str,
    wanted: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_bytes(prompts(1))
    assert main(["run-batch", "-i", source, "-o", target, "--model", "demo"]) == 2
    assert wanted in capsys.readouterr().err
    assert Path("in").read_bytes() == prompts(1)
