"""Picks the back end that computes, once at start, or says why none fits.

Called by whoever builds a runner; knows the back ends by name only and loads none it does not try.
"""

from __future__ import annotations

from collections.abc import Callable

from octavo.errors import ConfigError
from octavo.kernels.ops import Ops


class UnfitError(Exception):
    """A back end cannot run on this machine; the message says why."""


def _native(num_threads: int) -> Ops:
    from octavo.kernels.cpu.native import NativeOps, unfit_reason

    reason = unfit_reason()
    if reason is not None:
        raise UnfitError(reason)
    return NativeOps(num_threads)


def _reference(num_threads: int) -> Ops:
    from octavo.kernels.reference import ReferenceOps

    return ReferenceOps(num_threads)


BACKENDS: dict[str, Callable[[int], Ops]] = {"native": _native, "reference": _reference}
"""Best first; "auto" takes the first that fits."""


def select_ops(backend: str, num_threads: int) -> Ops:
    """Returns the ops of `backend`: "auto" or a name of BACKENDS.

    The caller gives torch the threads the choice leaves it (`ops.torch_threads`). Raises
    ConfigError that lists every candidate with its reason where the named one does not fit.
    """
    if backend == "auto":
        for factory in BACKENDS.values():
            try:
                return factory(num_threads)
            except UnfitError:
                continue
    elif backend in BACKENDS:
        try:
            return BACKENDS[backend](num_threads)
        except UnfitError as error:
            problem = f"attention_backend {backend!r} does not fit: {error}"
            raise ConfigError(_with_candidates(problem), field="attention_backend") from error
    problem = f"attention_backend {backend!r} is unknown"
    raise ConfigError(_with_candidates(problem), field="attention_backend")


def unfit_reasons() -> dict[str, str | None]:
    """Returns why each back end does not fit this machine, None where it does; best first."""
    reasons: dict[str, str | None] = {}
    for name, factory in BACKENDS.items():
        try:
            factory(1)
            reasons[name] = None
        except UnfitError as error:
            reasons[name] = str(error)
    return reasons


def _with_candidates(problem: str) -> str:
    lines = [f"{name}: {reason or 'fits'}" for name, reason in unfit_reasons().items()]
    return f"{problem}; use auto or one of: " + "; ".join(lines)
