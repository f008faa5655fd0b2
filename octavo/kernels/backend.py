"""A back end: its ops, and all that whoever builds a runner must know of it, so that nobody asks
for its name.

Made by the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.ops import Ops
from octavo.observe.progress import Progress
from octavo.parallel import Collectives


class KernelBuilds(Protocol):
    """Kernels that are built before they first run."""

    def can_build(self) -> bool:
        """Whether `building` is possible here."""
        ...

    def building(self, num_threads: int) -> AbstractContextManager[None]:
        """Has launches made inside build their kernels, on `num_threads` threads, and run none."""
        ...

    def tell_builds(self, progress: Progress) -> None:
        """From now on `progress` is told of launches in this thread that may have to build."""
        ...


class StepRecorder(Protocol):
    """Runs again what ops were asked for, without asking each."""

    def record(self, body: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        """Runs `body`, and returns its result and what runs it again: over the same addresses, so
        that inputs are read where they were, and the result is written where it was. None where
        something but ops had a part in it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingKernels:
    """Chooses tokens where the logits are. S sampled rows, R persistent ones, V vocabulary."""

    row_params: np.dtype[Any]
    """What is known of a persistent row; on the device int32 [R, F], as the bytes lie."""
    mask_logits: Callable[[Tensor, Tensor, Tensor], None]
    """(logits_SV, places_M, words_MW): leaves the rows at `places` the ids whose bits are set."""
    bias_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(logits_SV, places_B, ids_B, values_B): adds to logits in place."""
    penalise: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(logits_SV, batch_S2, params_RF, counts): changes logits in place."""
    find_thresholds: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(logits_SV, batch_S2, params_RF): what top_k, top_p and min_p leave of each row."""
    choose: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(logits_SV, batch_S2, params_RF, thresholds_S2, last_sampled_R, counts): int32 [S]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What computes, and what it asks of those around it."""

    ops: Ops
    maps_weights: bool
    """Multiplies matrices where their file is mapped, in the file's formats; else they are copied
    to its device, as numbers, those of a product side by side."""
    sampling: SamplingKernels | None = None
    """With these, ops return before they have run, and sampled tokens stay where they are; a
    runner that waits for nothing is for them. None: ops have run when they return."""
    builds: KernelBuilds | None = None
    over_peers: Callable[[Collectives, int, torch.dtype, torch.device], Collectives] | None = None
    """(collectives, columns, dtype, device): returns some that sum rows of so many columns by this
    back end's kernels, where ranks can reach each other's memory."""
    recorder: StepRecorder | None = None
