"""Owns the look into a checkpoint folder: its JSON files, and which weight files belong to it.

Called by `hub`, by the safetensors reader and by the tokenizer. Never reads a tensor, and never
imports torch: the front process and `octavo plan` come through here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelError, WeightsError

INDEX_FILE = "model.safetensors.index.json"


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file. Raises ModelError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, None if there is no file. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Returns the weight files that the index names, or all without one. Raises WeightsError."""
    index = folder / INDEX_FILE
    if not index.exists():
        # Mistral's own checkpoints hold the same weights again, under other names.
        found = [p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")]
        return tuple(sorted(found))
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names: dict[str, str] = content["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weights: {error!r}") from error
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}; "
            "download the model again"
        )
    return tuple(folder / shard for shard in shards)
