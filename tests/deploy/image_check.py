"""`make image-check`: the Dockerfile's own steps, run by buildah, and the image used as its user.

Takes minutes and hundreds of MB of packages: not part of the suite. Needs root and apt-get; no
container engine and no registry of images, for the base is made of Debian's packages, as slim as
python:slim. Prints one JSON line a variant; fails if anything is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim"
SUITE = "bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = "ca-certificates,python3,python3-distutils"
UNWANTED = ("doc", "man", "info", "locale")
"""Folders of /usr/share that slim images leave out."""
COMPILERS = ("cc", "gcc", "g++", "c++", "clang")
APT = ("apt-get", "install", "-y", "-q", "--no-install-recommends")
MAX_BEYOND_TORCH = 400_000_000
STAND_IN = """FROM scratch
ADD base.tar /
COPY pip.conf /etc/pip.conf
COPY certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY headers /usr/include
COPY pip-*.whl /
RUN ln -s python3 /usr/bin/python \\
 && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED \\
 && python $(ls /pip-*.whl)/pip install --no-cache-dir --no-index /pip-*.whl \\
 && rm /pip-*.whl
"""


class Images:
    """Buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        store, run = folder / "store", folder / "run"
        self._command = [
            "buildah",
            "--storage-driver",
            "overlay",
            "--root",
            str(store),
            "--runroot",
            str(run),
        ]
        self._folder = folder

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    def build(self, name: str, folder: Path, *arguments: str) -> None:
        # chroot: what else isolates a step needs control groups, which a sandbox has not.
        self(
            "bud",
            "--isolation",
            "chroot",
            "--format",
            "docker",
            "-t",
            name,
            *arguments,
            str(folder),
        )

    @contextlib.contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The root folder of an image, while the context is open."""
        container = self("from", "--pull-never", name)
        try:
            yield Path(self("mount", container))
        finally:
            self("umount", container)
            self("rm", container)


def install() -> None:
    wanted = [name for name in ("mmdebstrap", "buildah") if shutil.which(name) is None]
    if wanted:
        subprocess.run(
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", *wanted], check=True
        )


def make_base(images: Images, folder: Path) -> None:
    """Makes what stands in for python:slim: Debian's Python of this version, with pip."""
    tar = folder / "base.tar"
    if not tar.exists():
        source = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main"
        command = ["mmdebstrap", "--variant=minbase", "--format=tar", f"--include={PACKAGES}"]
        command += [f"--dpkgopt=path-exclude=/usr/share/{one}/*" for one in UNWANTED]
        subprocess.run([*command, SUITE, f"{tar}.part", source], check=True)
        os.rename(f"{tar}.part", tar)
    add_python_parts(folder)
    settings = pip_settings()
    lines = [f"{name} = {value}" for name, value in settings.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / "certificates.crt")
    (folder / "Dockerfile").write_text(STAND_IN)
    images.build(f"docker.io/library/{BASE}", folder)


def add_python_parts(folder: Path) -> None:
    """Lays beside the base what python:slim has and Debian's packages have not, or with far more
    around it: pip, and the headers."""
    for old in folder.glob("pip-*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, "pip"], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    target = folder / "headers" / version
    if not target.exists():
        shutil.copytree(sysconfig.get_paths()["include"], target)


def pip_settings() -> dict[str, str]:
    """Where this machine's pip finds packages: the image's has to look in the same places."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    pairs = [line.partition("=")[::2] for line in told.stdout.splitlines()]
    wanted = ("index-url", "extra-index-url", "find-links")
    found = {name.split(".")[-1]: value.strip("'") for name, value in pairs}
    return {name: found[name] for name in wanted if name in found}


def local_folders(settings: dict[str, str]) -> list[str]:
    """The folders of this machine among them. The pages of an index link to files beside it."""
    places = [one.removeprefix("file://") for value in settings.values() for one in value.split()]
    here = [Path(one) for one in places if one.startswith("/") and Path(one).is_dir()]
    return [str(one.parent if one.name == "simple" else one) for one in here]


def build(images: Images, folder: Path, variant: str) -> str:
    """Returns the name of the image."""
    volumes = [f"--volume={path}:{path}:ro" for path in local_folders(pip_settings())]
    python = BASE.removeprefix("python:").removesuffix("-slim")
    # Debian 12's buildah does not follow a base that is a variable.
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert text.count("FROM ${VARIANT}\n") == 1
    plain = folder / f"Dockerfile.{variant}"
    plain.write_text(text.replace("FROM ${VARIANT}\n", f"FROM {variant}\n"), encoding="utf-8")
    name = f"localhost/octavo:{variant}"
    # No other index: this machine's pip knows where torch is.
    arguments = [f"--build-arg={one}" for one in (f"PYTHON={python}", "TORCH_INDEX=")]
    images.build(name, ROOT, "--pull-never", f"--file={plain}", *volumes, *arguments)
    return name


def sizes(root: Path) -> dict[str, int]:
    """Bytes of the image, of torch with what it alone brings, and of the rest."""
    (packages,) = {path.parent for path in root.glob("usr/local/lib/python3*/*-packages/torch")}
    files = {
        one.locate_file(file)
        for one in _with_requirements("torch", str(packages))
        for file in one.files or ()
    }
    torch = sum(Path(str(path)).stat().st_blocks * 512 for path in files)
    told = subprocess.run(["du", "-sxB1", root], capture_output=True, text=True, check=True)
    total = int(told.stdout.split()[0])
    return {"image_bytes": total, "torch_bytes": torch, "beyond_torch_bytes": total - torch}


def _with_requirements(name: str, folder: str) -> list[importlib.metadata.Distribution]:
    """The packages of a folder that one of them needs, with itself."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [name]
    while wanted:
        name = wanted.pop().replace("_", "-").lower()
        here = importlib.metadata.distributions(name=name, path=[folder])
        if name in found or (one := next(iter(here), None)) is None:
            continue
        found[name] = one
        wanted += [re.split(r"[^\w.-]", each)[0] for each in one.requires or ()]
    return list(found.values())


class Container:
    """Commands in an image as its user: read-only but for its volume and /tmp, no capabilities."""

    def __init__(self, root: Path, config: dict[str, Any], home: Path) -> None:
        self._root = root
        self._config = config
        self._home = home
        self.user = int(config["User"])
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        os.chown(home, self.user, self.user)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        (volume,) = self._config["Volumes"]
        root, user = shlex.quote(str(self._root)), self.user
        environment = ["env", "-i", "-C", self._config["WorkingDir"], *self._config["Env"]]
        script = f"""set -e
mount --make-rprivate /
mount --bind {root} {root}
mount --bind {shlex.quote(str(self._home))} {root}{volume}
mount -t tmpfs -o nosuid,nodev,noexec tmpfs {root}/tmp
mount --rbind /dev {root}/dev
mount -t proc proc {root}/proc
cp /etc/resolv.conf {root}/etc/resolv.conf
mount -o remount,bind,ro {root}
exec setpriv --no-new-privs chroot --userspec={user}:{user} {root} \\
  {shlex.join([*environment, *command])}"""
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]
        return subprocess.Popen(isolated, text=True, **options)

    def succeeds(self, *command: str) -> bool:
        quiet = subprocess.DEVNULL
        return self.start(*command, stdout=quiet, stderr=quiet).wait(120) == 0

    def sh(self, script: str) -> bool:
        return self.succeeds("sh", "-c", script)


def check_bounds(container: Container, has_compiler: bool) -> None:
    """Checks who runs there, what can be written, and whether a compiler is there."""
    assert container.sh(f"test $(id -u) = {container.user}")
    for path in ("/x", "/usr/local/x", "/etc/x"):
        assert not container.sh(f"touch {path}"), path
    for path in ("~/x", "/tmp/x"):
        assert container.sh(f"touch {path}"), path
    found = [name for name in COMPILERS if container.sh(f"command -v {name}")]
    assert bool(found) == has_compiler, found


def check_launchers(container: Container) -> None:
    """Checks that what Triton does for a launcher can be done: Python's headers, a shared library
    that is linked in /tmp (where nothing may be run) and loaded from the home."""
    source = "#include <Python.h>\\nint answer(void) { return 42; }\\n"
    include = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')"
    load = "import ctypes; assert ctypes.CDLL('/home/octavo/a.so').answer() == 42"
    steps = (
        f"printf '{source}' > /tmp/a.c",
        f"gcc /tmp/a.c -O3 -shared -fPIC -I{include} -o /tmp/a.so",
        "cp /tmp/a.so ~/a.so",
        f'python -c "{load}"',
    )
    assert container.sh(" && ".join(steps))


def check_serving(container: Container, config: dict[str, Any]) -> dict[str, float]:
    """Starts the image's own command, on a free port, and uses it as people do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (old,) = (one for one in config["ExposedPorts"] if one.endswith("/tcp"))
    old = old.removesuffix("/tcp")
    command = [*config["Entrypoint"], *config["Cmd"]]
    command = [str(port) if one == old else one for one in command]
    began = time.monotonic()
    server = container.start(*command, "--kv-cache-memory-bytes", "256MiB")
    url = f"http://127.0.0.1:{port}"
    try:
        _until_ready(server, f"{url}/ready")
        seconds = time.monotonic() - began
        probe, *arguments = config["Healthcheck"]["Test"]
        assert probe == "CMD"
        assert container.succeeds(*(one.replace(f":{old}", f":{port}") for one in arguments))
        assert not container.succeeds(*(one.replace(f":{old}", ":1") for one in arguments))
        body = {
            "messages": [{"role": "user", "content": "What is a page of memory?"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        asked = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            told = json.load(answer)
        assert told["choices"][0]["message"]["content"].strip()
        with urllib.request.urlopen(f"{url}/version", timeout=20) as answer:
            assert json.load(answer)["version"]
    finally:
        # unshare passes no signal on: its child's child is the server.
        subprocess.run(["pkill", "-TERM", "-P", str(server.pid)], check=False)
        ended = server.wait(90)
    assert ended == 0, f"the server ended with {ended}"
    return {"seconds_to_ready": round(seconds, 1)}


def _until_ready(server: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError("not ready in five minutes")


def check(images: Images, folder: Path, variant: str) -> dict[str, Any]:
    """Builds a variant and returns what was found of it."""
    began = time.monotonic()
    name = build(images, folder, variant)
    built = round(time.monotonic() - began)
    config = json.loads(images("inspect", "--type", "image", name))["Docker"]["config"]
    with images.mounted(name) as root:
        found: dict[str, Any] = {"variant": variant, "build_seconds": built, **sizes(root)}
        container = Container(root, config, folder / "home")
        check_bounds(container, has_compiler=variant == "cuda")
        if variant == "cuda":
            check_launchers(container)
        found |= check_serving(container, config)
    assert found["beyond_torch_bytes"] < MAX_BEYOND_TORCH, found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--variant", action="append", choices=("cpu", "cuda"), default=[])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "image-check")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    install()
    images = Images(args.folder)
    make_base(images, args.folder)
    for variant in args.variant or ("cpu", "cuda"):
        print(json.dumps(check(images, args.folder, variant)), flush=True)


if __name__ == "__main__":
    main()
