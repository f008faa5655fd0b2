"""A folder that cannot be written is one line that names it and says the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from octavo.cli import main
from octavo.errors import ConfigError
from octavo.folders import CACHE_WAY_OUT, check_writable, new_temporary_folder, writing
from octavo.weights.demo import demo_path
from octavo.weights.hub import resolve_model
from tests.no_folder import NOWHERE

"""Nobody can make a folder there, not even root."""


def test_a_folder_is_made_where_it_can_be(tmp_path: Path):
    check_writable(tmp_path / "a" / "b", CACHE_WAY_OUT)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"file.* cannot be written: .*set OCTAVO_CACHE"):
            check_writable(place, CACHE_WAY_OUT)


def test_a_full_disk_is_named_with_its_folder(tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: No space left"),
        writing(tmp_path, CACHE_WAY_OUT),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_demo_models_need_a_cache_folder(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OCTAVO_CACHE", NOWHERE)
    with pytest.raises(ConfigError, match=f"{NOWHERE} cannot be written: .*set OCTAVO_CACHE"):
        demo_path(name)


@pytest.mark.parametrize("argv", [["demo", "--dense"], ["plan", "demo"]])
def test_the_command_line_shows_one_line(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OCTAVO_CACHE", NOWHERE)
    assert main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"octavo {argv[0]}: error: the folder {NOWHERE} cannot be written")


def test_a_download_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch):
    def download(*_: Any, cache_dir: str, **__: Any) -> str:
        os.makedirs(cache_dir)
        raise AssertionError("it can be made")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=f"folder {NOWHERE} cannot be written.*--download-dir"):
        resolve_model("somebody/something", download_dir=NOWHERE)


def test_where_no_temporary_folder_can_be_made_the_way_out_is_said(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("tempfile.tempdir", NOWHERE)
    with pytest.raises(ConfigError, match=r"no temporary folder can be made: .*set TMPDIR"):
        new_temporary_folder()


def test_launch_shapes_need_a_cache_folder(tmp_path: Path):
    code = (
        "from pathlib import Path\nfrom octavo.errors import ConfigError\n"
        "from octavo.kernels.triton.tuning.shapes import save_shape\n"
        f"try: save_shape(Path({NOWHERE!r}, 'x.json'), ('rows', 1), None)\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "No module named 'triton'" in done.stderr:
        pytest.skip("triton is not installed")
    assert f"{NOWHERE} cannot be written" in done.stdout, done.stderr
