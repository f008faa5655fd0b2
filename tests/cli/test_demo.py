"""`octavo demo`, with the models themselves played by a function."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.cli import main
from octavo.errors import ModelNotFoundError
from octavo.weights import demo


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were asked for."""
    names: list[str] = []

    def demo_path(name: str, num_experts: int) -> Path:
        names.append(name)
        return Path("/cache") / (name if num_experts == 4 else f"{name}-{num_experts}")

    monkeypatch.setattr(demo, "demo_path", demo_path)
    return names


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], ["demo", "demo-moe"]), (["--dense"], ["demo"]), (["--moe"], ["demo-moe"])],
)
def test_paths_go_to_stdout_and_what_the_models_are_to_stderr(
    flags: list[str],
    expected: list[str],
    made: list[str],
    capsys: pytest.CaptureFixture[str],
):
    assert main(["demo", *flags]) == 0
    captured = capsys.readouterr()
    assert made == expected
    assert captured.out.split() == [f"/cache/{name}" for name in expected]
    assert all(f"{name}: " in captured.err for name in expected)
    assert f"octavo serve {expected[-1]}" in captured.err


def test_path_only_prints_nothing_else(made: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--moe", "--path-only"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("/cache/demo-moe\n", "")


def test_a_failed_download_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(name: str, num_experts: int) -> Path:
        raise ModelNotFoundError("pip could not download it")

    monkeypatch.setattr(demo, "demo_path", fail)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "octavo demo: error: pip could not download it\n"


def test_a_model_of_other_experts_is_served_by_its_path(
    made: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--moe", "--experts", "8"]) == 0
    captured = capsys.readouterr()
    assert (made, captured.out) == (["demo-moe"], "/cache/demo-moe-8\n")
    assert "octavo serve /cache/demo-moe-8" in captured.err


@pytest.mark.parametrize("count", ["1", "65", "-8", "8.0", "many"])
def test_a_number_of_experts_that_cannot_be_is_named(
    count: str, made: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["demo", f"--experts={count}"])
    assert f"'{count}' is no number of experts; give 2 to 64" in capsys.readouterr().err
    assert not made
