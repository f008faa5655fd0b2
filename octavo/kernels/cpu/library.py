"""The compiled kernels, loaded through ctypes, or why there are none.

Used by `native.py`; the registry asks for the reason first.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from ctypes import POINTER, c_char_p, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.kernels.cpu.fingerprint import fingerprint
from octavo.kernels.cpu.recording import CallStruct
from octavo.kernels.cpu.structs import ActivationStruct, MoEStruct, QuantizingStruct, RouteStruct

SIGNATURES: dict[str, list[Any]] = {
    "linear": [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p],
    "gated_mlp": [c_void_p, c_int64, c_void_p, POINTER(ActivationStruct), c_void_p, c_void_p],
    "moe": [POINTER(MoEStruct)],
    "embedding": [c_void_p, c_int64, c_void_p, c_void_p],
    "rms_norm": [c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p],
    "add_rms_norm": [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p],
    "route": [POINTER(RouteStruct)],
    "rope_and_cache": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
        *(POINTER(QuantizingStruct), c_void_p, c_void_p),
    ],
    "attention": [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p],
}
"""Arguments after the pool; every op returns a status."""
ISAS = {
    "avx2": "AVX2, FMA, F16C",
    "avx512": "AVX-512 F, BW, DQ, VL, VBMI, VNNI",
    "avx512_bf16": "those and AVX-512 BF16",
}
"""Instruction sets, worst first, and what they are made of: the order is that of `enum Isa` in
native.h. All but the last give the same bits."""


def library_path() -> Path | None:
    """Returns where the compiled kernels lie, or None if they were not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if path.exists():
            return path
    return None


def load_library() -> ctypes.CDLL:
    """Returns the compiled kernels.

    Raises OSError saying why they cannot be loaded, and ConfigError if they are not those of the
    sources beside them: they would give wrong answers.
    """
    path = library_path()
    if path is None:
        raise OSError(
            f"{Path(__file__).parent}/_native*.so is not built (no C++ compiler at install? "
            "build it with: python setup.py build_ext --inplace)"
        )
    library = ctypes.CDLL(str(path))
    _check_sources(library, path)
    library.octavo_supports.argtypes, library.octavo_supports.restype = [c_int64], c_int64
    library.octavo_prefers_bf16.restype = c_int64
    library.octavo_create.argtypes, library.octavo_create.restype = [c_int64] * 3, c_void_p
    library.octavo_destroy.argtypes, library.octavo_destroy.restype = [c_void_p], None
    library.octavo_replay.argtypes = [c_void_p, POINTER(CallStruct), c_int64]
    library.octavo_replay.restype = c_int64
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"octavo_{name}")
        function.argtypes, function.restype = [c_void_p, *arguments], c_int64
    return library


def _check_sources(library: ctypes.CDLL, path: Path) -> None:
    wanted = fingerprint(Path(__file__).parent)
    try:
        library.octavo_sources.restype = c_char_p
        found = library.octavo_sources().decode()
    except AttributeError:
        found = "none"  # older than this check
    if wanted not in (None, found):
        raise ConfigError(
            f"{path} was built from other sources (fingerprint {found}, here {wanted}) and would "
            "give wrong answers; build it again with: python setup.py build_ext --inplace --force",
            field="attention_backend",
        )


def unfit_reason() -> str | None:
    """Returns why the native kernels cannot run on this machine, or None if they can."""
    try:
        library = load_library()
    except OSError as error:
        return str(error)
    if not supported_isas(library):
        return f"the CPU lacks one of {ISAS['avx2']}"
    return None


def supported_isas(library: ctypes.CDLL) -> tuple[str, ...]:
    """Returns the instruction sets of ISAS that this CPU runs, worst first."""
    return tuple(name for code, name in enumerate(ISAS) if library.octavo_supports(code))
