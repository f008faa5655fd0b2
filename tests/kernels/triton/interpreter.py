"""Makes Triton kernels run on this machine: on its GPU, or through Triton's interpreter.

Imported by the Triton tests before any kernel; tests/conftest.py has asked for the interpreter
where there is no GPU. CI installs triton beside the CPU build of torch and so runs it.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton = pytest.importorskip(
    "triton", reason="triton is not installed (pip install --no-deps triton==3.6.0)"
)
if DEVICE == "cpu" and not triton.__version__.startswith("3.6."):
    reason = f"the interpreter of Triton {triton.__version__} is not known, only that of 3.6"
    pytest.skip(reason, allow_module_level=True)

from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    # Triton 3.6 calls int() on one-element arrays, which NumPy 2.4 refuses.
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_and_index

_run_grid = interpreter.GridExecutor.__call__


def _run_grid_in_silence(self: Any, *args: Any, **kwargs: Any) -> Any:
    # A device gives inf and NaN without a word; NumPy's warnings are errors in the tests.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), _patched_languages:
        return _run_grid(self, *args, **kwargs)


interpreter.GridExecutor.__call__ = _run_grid_in_silence


class _PatchedLanguages:
    """Patches what a launch's device functions see of Triton's language: once a launch, where
    Triton does it again at every call of one; and puts it back at the end."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    def __enter__(self) -> None:
        for functions in _FUNCTIONS:
            self.scopes.append(interpreter._patch_lang(functions))

    def __exit__(self, *_: object) -> None:
        while self.scopes:
            self.scopes.pop().restore()


_FUNCTIONS = [SimpleNamespace(__globals__={"language": each}) for each in (tl, tl.core)]
_patched_languages = _PatchedLanguages()


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter.InterpretedFunction.__call__ = _call_device_function

# Computed for every sum and product of integers, and then dropped without the debug option: half
# of all time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

# As Triton's, which makes a table of all types at every call.
_numpy_of_number = lru_cache(maxsize=None)(interpreter._get_np_dtype)


def _numpy_of(type_: Any) -> Any:
    scalar = type_.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_of_number(scalar)


interpreter._get_np_dtype = _numpy_of

_convert = interpreter.InterpreterBuilder.create_fp_to_fp


def _convert_rounding_to_even(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    # Triton 3.6 rounds halves up, and what is rounded to the next power of two to half of it.
    if dst_type.scalar != triton.language.float8e4nv or src.dtype.scalar != triton.language.float32:
        return _convert(self, src, dst_type, rounding_mode)
    values = torch.from_numpy(src.data.astype("float32")).to(torch.float8_e4m3fn)
    data = values.view(torch.uint8).numpy()
    return interpreter.TensorHandle(data, dst_type.scalar)


interpreter.InterpreterBuilder.create_fp_to_fp = _convert_rounding_to_even

if DEVICE == "cpu":  # A GPU's compiler takes types as they are.
    from tests.kernels.triton import quick_types  # noqa: F401
