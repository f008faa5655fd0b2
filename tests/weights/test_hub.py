"""Where models come from. The hub itself is played by a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file

from octavo.errors import ModelError, ModelNotFoundError, OctavoError, UnsupportedModelError
from octavo.weights import hub
from octavo.weights.hub import resolve_model, resolve_tokenizer
from tests.models.tiny import TinyModel, save_tiny
from tests.weights.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("llama", tmp_path_factory.mktemp("saved"))


def write_folder(folder: Path, config: object = None, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if weights:
        save_file({"m": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder


def test_a_folder_is_found_with_its_configs(tmp_path: Path):
    write_folder(tmp_path, {"model_type": "llama", "hidden_size": 3})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    files = resolve_model(str(tmp_path))
    assert (files.kind, files.path, files.name) == ("safetensors", tmp_path, str(tmp_path))
    assert files.config["hidden_size"] == 3
    assert files.generation_config == {"eos_token_id": 7}


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, {"eos_token_id": 3}, 3),
        (None, {"eos_token_id": [3, 4]}, [3, 4]),
        (None, {"text_config": {"eos_token_id": 5}}, 5),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 5}}, 5),
        (None, {"eos_token_id": 3, "text_config": {"eos_token_id": 5}}, 3),
        (None, {"text_config": None}, None),
        ({}, {"eos_token_id": 3}, 3),
        ({"temperature": 0.5}, {"eos_token_id": 3}, 3),
        ({"eos_token_id": [7]}, {"eos_token_id": 3}, [7]),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, 0),
        ({"eos_token_id": None}, {"eos_token_id": 3}, None),
    ],
)
def test_what_ends_a_sequence_comes_from_whichever_file_names_it(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], wanted: object
):
    write_folder(tmp_path, {"model_type": "llama", **config})
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = resolve_model(str(tmp_path)).generation_config
    assert found.get("eos_token_id") == wanted
    assert found.get("temperature") == (generation or {}).get("temperature")


def test_a_gguf_file_is_found_alone_and_in_a_folder_without_config(
    saved: TinyModel, tmp_path: Path
):
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, saved)
    files = resolve_model(str(path))
    assert (files.kind, files.path) == ("gguf", path)
    assert files.config["model_type"] == "llama"
    assert resolve_model(str(tmp_path)).path == path
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"has model\.gguf, other\.gguf; give the path"):
        resolve_model(str(tmp_path))


def test_the_identity_changes_with_the_weights_and_with_nothing_else(tmp_path: Path):
    folder = write_folder(tmp_path)
    first = resolve_model(str(folder)).identity
    (folder / "README.md").write_text("new")
    assert resolve_model(str(folder)).identity == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    second = resolve_model(str(folder)).identity
    write_folder(tmp_path, {"model_type": "llama", "rope_theta": 5}, weights=False)
    assert len({first, second, resolve_model(str(folder)).identity}) == 3


def test_dummy_weights_need_a_config_only_and_are_identified_by_the_seed(tmp_path: Path):
    folder = str(write_folder(tmp_path, weights=False))
    files = resolve_model(folder, load_format="dummy")
    assert files.kind == "config"
    assert files.identity == resolve_model(folder, load_format="dummy", seed=0).identity
    assert files.identity != resolve_model(folder, load_format="dummy", seed=1).identity


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("{", ModelError, r"config\.json is no valid JSON"),
        ("[1]", ModelError, r"config\.json must hold a JSON object, got list"),
        (
            '{"quantization_config": {"quant_method": "gtpq"}}',
            UnsupportedModelError,
            "'gtpq' is not known: .* the nearest is gptq",
        ),
        ("{}", ModelNotFoundError, r"has no weights: .* --load-format dummy"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    given: str, error: type[OctavoError], message: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(given)
    with pytest.raises(error, match=message):
        resolve_model(str(tmp_path))


def test_pickled_weights_are_named_as_not_read(tmp_path: Path):
    write_folder(tmp_path, weights=False)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"only pytorch_model\.bin, which is not read"):
        resolve_model(str(tmp_path))


def test_an_empty_folder_and_a_wrong_format_are_refused(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json and no \.gguf file"):
        resolve_model(str(tmp_path))
    write_folder(tmp_path)
    with pytest.raises(ModelNotFoundError, match="must hold one GGUF model, it has none"):
        resolve_model(str(tmp_path), load_format="gguf")


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "no.gguf", "a b"])
def test_what_is_no_hub_id_is_not_looked_up_there(model: str, monkeypatch: pytest.MonkeyPatch):
    play_hub(monkeypatch, lambda **_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelNotFoundError, match="there is no folder or file"):
        resolve_model(model)


def play_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> list[dict[str, Any]]:
    """Answers downloads with `answer`; returns the list of what was asked for."""
    calls: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return answer(**options)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    return calls


def test_an_id_is_downloaded_with_the_needed_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_folder(tmp_path)
    calls = play_hub(monkeypatch, lambda **_: str(folder))
    files = resolve_model("org/model-1.5B", revision="main", download_dir="/somewhere")
    assert (files.kind, files.path, files.name) == ("safetensors", folder, "org/model-1.5B")
    resolve_model("org/model-1.5B", load_format="dummy")
    assert [call["repo"] for call in calls] == ["org/model-1.5B"] * 2
    assert (calls[0]["revision"], calls[0]["cache_dir"]) == ("main", "/somewhere")
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert "*.safetensors" not in calls[1]["allow_patterns"]
    assert not {"*.bin", "*.gguf"} & set(calls[0]["allow_patterns"])


def test_one_gguf_file_of_an_id_is_downloaded_with_all_its_parts(
    saved: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tiny_gguf(tmp_path / "m-q8.gguf", saved)
    calls = play_hub(monkeypatch, lambda **_: str(tmp_path))
    assert resolve_model("org/m-GGUF/m-q8.gguf").path == tmp_path / "m-q8.gguf"
    assert (calls[0]["repo"], calls[0]["allow_patterns"]) == ("org/m-GGUF", ["m-q8.gguf"])
    with pytest.raises(ModelNotFoundError, match=r"org/m has no file q/m-00001-of-00002\.gguf"):
        resolve_model("org/m/q/m-00001-of-00002.gguf")
    assert calls[1]["allow_patterns"] == ["q/m-?????-of-00002.gguf"]


def test_an_id_with_gguf_files_only_says_which_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    play_hub(monkeypatch, lambda **_: str(tmp_path))
    names = ["README.md", "m-Q4_K.gguf", "m-Q8_0.gguf"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    with pytest.raises(ModelNotFoundError, match=r"choose one: org/m/m-Q4_K\.gguf, org/m/m-Q8_0"):
        resolve_model("org/m")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find the appropriate snapshot"),
        HfHubHTTPError.__bases__[0]("no route to host"),
        ValueError("bad id"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unknown_id_says_everything_that_was_tried(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def fail(**_: Any) -> str:
        raise error

    play_hub(monkeypatch, fail)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("org/unknown")
    message = str(caught.value)
    assert "'org/unknown' was not found: there is no such folder" in message
    assert "demo-moe" in message
    assert str(error) in message


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def fail(**_: Any) -> str:
        try:
            raise ConnectionError("a long story of sockets")
        except ConnectionError as error:
            raise LocalEntryNotFoundError("cannot find the appropriate snapshot") from error

    play_hub(monkeypatch, fail)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("org/unknown")
    message = str(caught.value)
    assert "was not found here, and Hugging Face cannot be reached" in message
    assert "story" not in message


def test_a_tokenizer_is_given_as_models_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    calls = play_hub(monkeypatch, lambda **_: str(tmp_path))
    assert resolve_tokenizer(str(tmp_path)) == tmp_path
    assert not calls
    assert resolve_tokenizer("org/model", "/somewhere") == tmp_path
    assert (calls[0]["repo"], calls[0]["cache_dir"]) == ("org/model", "/somewhere")
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    with pytest.raises(ModelNotFoundError, match=r"^tokenizer: there is no folder or file \./no$"):
        resolve_tokenizer("./no")
