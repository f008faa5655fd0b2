"""Reads what sentence-transformers keeps beside a checkpoint: which modules follow the model.

Called by `hub`. It knows where the files lie and what a module is called, never what it does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelError
from octavo.weights.checkpoint import read_json, read_text

MODULES_FILE = "modules.json"


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """Returns the modules behind the model, in their order: `type`, the class's name alone, and
    `config`, what its config.json says. Empty without a modules.json. Raises ModelError."""
    found = []
    for entry in _entries(folder):
        kind = str(entry.get("type", "")).rpartition(".")[2]
        path = str(entry.get("path", ""))
        if kind != "Transformer":
            found.append({"type": kind, "config": read_json(folder / path / "config.json") or {}})
    return found


def module_files(folder: Path) -> list[str]:
    """Returns the files, relative to the folder, that `read_modules` reads besides the list."""
    paths = (str(entry.get("path", "")) for entry in _entries(folder))
    return [f"{path}/config.json" for path in paths if path]


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON: {error}; download it again") from error
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ModelError(f"{path} must hold a list of JSON objects; download it again")
    for entry in entries:
        parts = Path(str(entry.get("path", ""))).parts
        if Path(*parts).is_absolute() or ".." in parts:
            raise ModelError(f"{path} names {entry['path']!r}, which is outside of the model")
    return entries
