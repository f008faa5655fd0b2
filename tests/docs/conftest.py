"""A tiny model as the pages' examples need it, and servers of it as processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from tests.docs.examples import PAGE_MODEL
from tests.server.tiny_engine import CONFIG, write_model

ROOT = Path(__file__).resolve().parents[2]
OCTAVO = [sys.executable, "-c", "import sys; from octavo.cli import main; sys.exit(main())"]
ServerUrl = Callable[[tuple[str, ...]], str]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights, tokenizer and chat template, whose context is that of the demo."""
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    config = CONFIG | {"max_position_embeddings": 8192}
    MixtralForCausalLM(MixtralConfig(**config)).float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def server_url(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUrl]:
    """A function that starts `octavo serve` with the given options, once, and returns its URL."""
    started: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], str]] = {}

    def start(options: tuple[str, ...]) -> str:
        if options not in started:
            engine = ["--device=cpu", "--num-threads=1", "--kv-cache-memory=64MiB", "--port=0"]
            argv = [*OCTAVO, "serve", str(tiny_folder), "--served-model-name", PAGE_MODEL]
            log = tmp_path_factory.mktemp("server") / "log"
            with log.open("wb") as file:
                process = subprocess.Popen([*argv, *engine, *options], cwd=ROOT, stderr=file)
            started[options] = process, _read_url(process, log)
        return started[options][1]

    yield start
    for process, _ in started.values():
        process.terminate()
    for process, _ in started.values():
        assert process.wait(timeout=60) == 0


def _read_url(process: subprocess.Popen[bytes], log: Path) -> str:
    while True:
        has_ended = process.poll() is not None
        text = log.read_text()
        if found := re.search(r" is served on (http://\S+)", text):
            return found[1]
        assert not has_ended, f"the server ended: {text}"
        time.sleep(0.05)
