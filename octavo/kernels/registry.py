"""Picks the back end that computes, once at start, or says why none fits.

Called by whoever builds a runner; knows the back ends by name only and loads none it does not try.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.errors import ConfigError
from octavo.kernels.backend import Backend
from octavo.kernels.limits import AttentionWants, attention_unfit
from octavo.kernels.ops import Ops


class UnfitError(Exception):
    """A back end cannot run on this machine; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a back end must be able to do."""

    device: torch.device = torch.device("cpu")
    num_threads: int = 1
    attention: AttentionWants = AttentionWants()
    is_deterministic: bool = False
    rounds_activations: bool = False
    """Whether a CPU's products may take activations as bfloat16, where that is faster."""
    rounds_to_int8: bool = False
    """Whether products with block formats take activations rounded to int8."""
    tuned_folder: Path | None = None
    """Where `octavo tune` leaves launch shapes, if they are wanted."""


def _check_attention(backend: str, needs: Needs) -> None:
    reason = attention_unfit(backend, needs.attention)
    if reason is not None:
        raise UnfitError(reason)


def _check_rounding(needs: Needs) -> None:
    if needs.rounds_to_int8:
        raise UnfitError("it does not round activations to int8")


def _triton(needs: Needs) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise UnfitError("triton is not installed (GPU builds of torch bring it)")
    import triton

    if needs.device.type == "cpu" and not triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
        raise UnfitError("it needs a GPU, or TRITON_INTERPRET=1 to be tried without one")
    _check_attention("triton", needs)
    _check_rounding(needs)
    from octavo.kernels.triton.backend import TritonOps
    from octavo.kernels.triton.launching import building
    from octavo.kernels.triton.peers.sums import over_peers
    from octavo.kernels.triton.sampling.kernels import KERNELS
    from octavo.kernels.triton.tuning.shapes import Shapes, read_shapes, shapes_path

    shapes = Shapes()
    if needs.tuned_folder is not None:
        shapes = read_shapes(shapes_path(needs.tuned_folder, needs.device))
    ops = TritonOps(needs.num_threads, is_deterministic=needs.is_deterministic, shapes=shapes)
    return Backend(
        ops=ops,
        maps_weights=False,
        sampling=KERNELS,
        builds=building,
        over_peers=over_peers,
    )


def _native(needs: Needs) -> Backend:
    from octavo.kernels.cpu.library import unfit_reason
    from octavo.kernels.cpu.native import NativeOps

    reason = "it computes on the CPU" if needs.device.type != "cpu" else unfit_reason()
    if reason is not None:
        raise UnfitError(reason)
    _check_attention("native", needs)
    ops = NativeOps(
        needs.num_threads,
        rounds_activations=needs.rounds_activations,
        rounds_to_int8=needs.rounds_to_int8,
    )
    return Backend(ops=ops, maps_weights=True, recorder=ops)


def _reference(needs: Needs) -> Backend:
    from octavo.kernels.reference import ReferenceOps

    if needs.device.type != "cpu":
        raise UnfitError("it computes on the CPU")
    _check_attention("reference", needs)
    _check_rounding(needs)
    return Backend(ops=ReferenceOps(needs.num_threads), maps_weights=True)


BACKENDS: dict[str, Callable[[Needs], Backend]] = {
    "native": _native,
    "reference": _reference,
    "triton": _triton,
}
"""Best first; "auto" takes the first that fits."""


def select_backend(backend: str, needs: Needs) -> Backend:
    """Returns `backend`: "auto" or a name of BACKENDS.

    The caller gives torch the threads the choice leaves it (`ops.torch_threads`). Raises
    ConfigError that lists every candidate with its reason where none fits or the named one does
    not.
    """
    for name, factory in BACKENDS.items():
        if backend in ("auto", name):
            with suppress(UnfitError):
                return factory(needs)
    lines = [f"{name}: {reason or 'fits'}" for name, reason in unfit_reasons(needs).items()]
    raise ConfigError(
        f"attention_backend {backend!r} does not fit this model on {needs.device}; use auto or one "
        f"of: {'; '.join(lines)}",
        field="attention_backend",
    )


def select_ops(backend: str, needs: Needs) -> Ops:
    """Returns the ops of `select_backend`, for those who want nothing else."""
    return select_backend(backend, needs).ops


def unfit_reasons(needs: Needs) -> dict[str, str | None]:
    """Returns why each back end does not fit, None where it does; best first."""
    reasons: dict[str, str | None] = {}
    for name, factory in BACKENDS.items():
        try:
            factory(needs)
            reasons[name] = None
        except UnfitError as error:
            reasons[name] = str(error)
    return reasons
