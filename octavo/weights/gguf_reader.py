"""The values of one GGUF file as its config is made of them, with errors that name them. No torch.

Made by `gguf_config`, passed to what reads the parts of a config. It knows no key by name.
"""

from __future__ import annotations

from typing import Any

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.weights.gguf_file import GGUFFile


class Reader:
    """The values of one file, without the architecture's prefix, and with errors that name them."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._prefix = f"{file.metadata['general.architecture']}."

    def value(self, key: str) -> Any:
        return self.file.metadata.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, default, int)

    def size(self, key: str) -> int:
        """Returns an integer of at least 1."""
        if (found := self.integer(key)) < 1:
            raise self.refuse(key, "a number of at least 1")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, default, (int, float)))

    def shape(self, tensor: str, rank: int = 2) -> tuple[int, ...]:
        found = self.file.tensors.get(tensor)
        if found is None:
            raise WeightsError(f"{self.file.path}: tensor {tensor} is missing")
        if len(found.shape) != rank:
            raise WeightsError(
                f"{self.file.path}: {tensor} has the shape {list(found.shape)}, expected {rank} "
                "dimensions"
            )
        return found.shape

    def check_implied(self, key: str, expected: int, why: str) -> None:
        """Refuses another value of a key that follows from others, where it is there."""
        if self.integer(key, expected) != expected:
            raise self.refuse(key, f"{expected}, {why}")

    def refuse(self, key: str, known: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.file.path}: {self._prefix}{key} is {self.value(key)!r}; known is {known}"
        )

    def _typed(self, key: str, default: Any, types: Any) -> Any:
        value = self.value(key)
        if value is None:
            if default is None:
                raise UnsupportedModelError(f"{self.file.path}: {self._prefix}{key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, types):
            raise self.refuse(key, "one number for all layers")
        return value
