"""Programs of others that a Debian package has: installed by whoever needs them first."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

INSTALL = ("apt-get", "install", "-y", "-q", "--no-install-recommends")
SECONDS = 240


def _install(package: str) -> str:
    """Returns why it cannot be installed; empty if it is."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    if os.geteuid():
        return "apt-get needs root"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ((*INSTALL, package), ("apt-get", "update", "-q"), (*INSTALL, package)):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)} took longer than {SECONDS} s"
        if not done.returncode and package in command:
            return ""
    return done.stderr.strip()[-300:]


@pytest.fixture(scope="session")
def debian_program() -> Callable[[str, str], str]:
    """A function that returns the path of a program, of whose package it is told; the test is
    skipped, with the reason, where it cannot be had."""

    def find(program: str, package: str) -> str:
        if shutil.which(program) is None and (reason := _install(package)):
            pytest.skip(f"{program} of Debian's {package} cannot be had: {reason}")
        path = shutil.which(program)
        assert path is not None, f"{package} has no {program}"
        return path

    return find
