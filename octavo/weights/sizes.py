"""How many bytes the tensors of a safetensors checkpoint have, from the headers. No torch.

Asked by `octavo plan`, which must not load what it plans.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from octavo.errors import WeightsError
from octavo.weights.checkpoint import weight_files

_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}


def stored_bytes(folder: Path) -> dict[str, int]:
    """Returns the bytes of every tensor by name; empty if no weights are there. Raises
    WeightsError."""
    found: dict[str, int] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    bits = _BITS.get(entry["dtype"], 8)
                    found[name] = math.prod(entry["shape"]) * bits // 8
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} has a corrupt header: {error!r}") from error
    return found
