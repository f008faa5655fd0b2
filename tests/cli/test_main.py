"""The command line as a whole: help, errors in one line, suggestions."""

from __future__ import annotations

import contextlib
import signal

import pytest

from octavo import __version__
from octavo.cli import main
from octavo.cli.commands import COMMANDS
from octavo.engine import spawn


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"octavo {command}" in capsys.readouterr().out


def fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command line that must be refused; returns its one line."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_misspelt_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]):
    error = fail(["serve", "m", "--max-modl-len", "5"], capsys)
    assert "did you mean --max-model-len?" in error


def test_underscores_are_answered_with_the_real_spelling(capsys: pytest.CaptureFixture[str]):
    assert "did you mean --max-num-seqs?" in fail(["plan", "m", "--max_num_seqs=5"], capsys)


def test_an_option_of_a_nested_command_is_known_to_the_suggestion(
    capsys: pytest.CaptureFixture[str],
):
    error = fail(["bench", "latency", "m", "--batch-sise", "2"], capsys)
    assert error.startswith("octavo bench latency: error: ")
    assert "did you mean --batch-size?" in error


def test_abbreviated_options_are_refused(capsys: pytest.CaptureFixture[str]):
    fail(["serve", "m", "--max-model", "5"], capsys)


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]):
    assert "serve" in fail(["serv"], capsys)


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]):
    assert "MODEL is missing: a Hugging Face id, a folder" in fail(["serve"], capsys)
    assert "give it first" in fail(["serve", "--api-key", "key", "demo"], capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "m", "--dtype", "bf16"], "--dtype 'bf16' is unknown; use auto, float32"),
        (["serve", "m", "--port", "70000"], "port must be in 0..65535, got 70000"),
        (["plan", "m", "--gpu-memory-utilization", "1.5"], "at most 1, got 1.5"),
        (["plan", "m", "--max-num-seqs", "0"], "max_num_seqs must be"),
        (["plan", "/nowhere/at/all"], "/nowhere/at/all"),
        (["chat", "m", "--url", "http://127.0.0.1:1"], "either MODEL or --url"),
    ],
)
def test_our_own_errors_are_one_line_and_code_two(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"octavo {argv[0]}: error: ")
    assert words in error
    assert "Traceback" not in error


def test_the_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str]):
    for argv in ([], ["bench"]):
        assert main(argv) == 0
        assert "examples:" in capsys.readouterr().out


def test_every_help_ends_with_examples(capsys: pytest.CaptureFixture[str]):
    for command in ("serve", "chat", "plan", "tune", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "example" in capsys.readouterr().out.split("options:")[-1]


def test_the_version_is_printed_alone_as_vllms_is(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_peer_that_is_not_there_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "latency", "/no/such/model", "--peer", "transformers"]) == 2
    assert "needs the package transformers" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_get_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in COMMANDS:
        assert command in script


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[spawn.HeadStart]:
    """The engine processes that begin before options are read."""
    found: list[spawn.HeadStart] = []

    class Noted(spawn.HeadStart):
        def __init__(self) -> None:
            super().__init__()
            found.append(self)

    monkeypatch.setattr(spawn, "HeadStart", Noted)
    return found


@pytest.mark.parametrize("wrong", ["--no-such-option", "--port=x", "--tensor-parallel-size=0"])
def test_no_engine_process_outlives_wrong_options(
    wrong: str, begun: list[spawn.HeadStart], capsys: pytest.CaptureFixture[str]
):
    with contextlib.suppress(SystemExit):
        assert main(["serve", "m", wrong]) == 2
    assert "error: " in capsys.readouterr().err
    assert [one.process.returncode for one in begun] == [-signal.SIGKILL]


def test_help_needs_no_engine_process(begun: list[spawn.HeadStart]):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert begun == []
