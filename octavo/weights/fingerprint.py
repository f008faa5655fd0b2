"""What names a model's weights on every host alike, where times of files differ.

Called where engines of several hosts are to be one fleet, or the ranks of one engine. Reads a few
places of each file, never all of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from octavo.weights.checkpoint import weight_files
from octavo.weights.gguf_file import read_gguf
from octavo.weights.hub import ModelFiles

SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 5
"""Places of a file that are read: its beginning, its end, and between them."""


def with_fingerprint(files: ModelFiles) -> ModelFiles:
    """Returns the files with an identity that hosts with the same weights have in common: of the
    config, and of the weights' names, sizes and samples. Raises OSError if they cannot be read."""
    if files.kind == "config":  # there are none
        return files
    paths = read_gguf(files.path).paths if files.kind == "gguf" else weight_files(files.path)
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for path in paths:
        _add(digest, path)
    return replace(files, identity=digest.hexdigest())


def _add(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"\n{path.name} {size}\n".encode())
    last = max(size - SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        for start in sorted({last * place // (NUM_SAMPLES - 1) for place in range(NUM_SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
