"""Random weights from names and shapes alone, for measuring and for `--load-format dummy`.

Made by `loader`. Never reads a file; equal seeds give equal weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.errors import WeightsError
from octavo.formats import WEIGHT_FORMATS, WeightFormat
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout
from octavo.weights.source import DTYPE_FORMATS, NUMBER_DTYPES, part_of
from octavo.weights.staging import Staging

_BOUND = 1e-3
_EMBEDDING = "embed_tokens.weight"
_EMBEDDING_FACTOR = 10.0
_NOISE_LENGTH = (1 << 22) - 3
"""Numbers drawn once; a prime, so that no row length lines up with it."""


class DummySource:
    """A TensorSource with matrices even in +-0.001, norms of one and biases of zero.

    The embedding is ten times larger: what attention adds to the rows of a shared prefix is alike,
    and where it outweighs the tokens all rows take the same experts. So they spread like random
    rows (32 of them over 106 to 116 of 128 experts with top 8, in 12 layers of Qwen3-30B-A3B), as
    a benchmark of MoE needs.

    Every matrix reads one stream of noise from its own place on: billions of weights cost no more
    than writing them, and repeat only after four million numbers.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._format = WEIGHT_FORMATS[DTYPE_FORMATS[dtype]]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(_NOISE_LENGTH, generator=generator).mul_(2).sub_(1).mul_(_BOUND)
        self._noise = {torch.device("cpu"): noise.to(NUMBER_DTYPES[self._format.name])}

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._shapes.get(name)
        if found is None:
            raise WeightsError(f"tensor {name} is missing from the dummy weights")
        return found

    def format(self, name: str) -> WeightFormat:
        return self._format

    def device_format(self, name: str) -> WeightFormat:
        return self._format

    def matrix(self, name: str) -> Weight:
        rows, cols = self.shape(name)
        data = torch.empty((rows, cols), dtype=NUMBER_DTYPES[self._format.name])
        self._fill(name, data.view(-1), 0)
        return Weight(data=data, format=self._format, rows=rows, cols=cols)

    def copy_into(self, name: str, out: Tensor, staging: Staging, row: int, col: int) -> None:
        cols = self.shape(name)[1]
        whole = out if out.shape[1] == cols else out.new_empty((len(out), cols))
        self._fill(name, whole.view(-1), row * cols)
        if whole is not out:
            out.copy_(part_of(whole, out, 0, col))

    def _fill(self, name: str, out: Tensor, start: int) -> None:
        """Fills a 1-D tensor with the matrix's numbers from `start` on."""
        noise = self._noise.get(out.device)
        if noise is None:
            noise = self._noise[out.device] = self._noise[torch.device("cpu")].to(out.device)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        place = (int.from_bytes(digest[:8], "little") + start) % _NOISE_LENGTH
        filled = 0
        while filled < len(out):
            piece = noise[place : place + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            place = 0
        if name.endswith(_EMBEDDING):
            out.mul_(_EMBEDDING_FACTOR)

    def order(self, name: str) -> Tensor | None:
        return None

    def layout(self, name: str) -> PlaneLayout | None:
        return None

    def copy_planes(self, name: str, out: Planes, staging: Staging, row: int, cols: range) -> None:
        raise AssertionError(f"{name} is numbers")

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """Returns what draws the codes of a packed matrix called `name` on `device`."""
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "little"))

    def vector(self, name: str) -> Tensor:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(self.shape(name), fill)

    @property
    def nbytes(self) -> int:
        elements = sum(math.prod(shape) for shape in self._shapes.values())
        return elements * self._format.block_bytes
