"""Records what a step asks of the native ops, to ask it again in one call.

Used by `native.py`, whose ops tell it of their calls. A recording holds addresses, and the tensors
behind them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPS = (
    *("embedding", "rms_norm", "add_rms_norm", "linear", "gated_mlp", "moe", "route"),
    *("rope_and_cache", "attention"),
)
"""The order is that of `enum Op` in replay.cpp."""
_CODES = {name: code for code, name in enumerate(OPS)}
_COMPUTES_NOTHING = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "view", "slice"),
        *("select", "expand", "unsqueeze", "squeeze", "as_strided", "t", "transpose", "permute"),
        *("split", "split_with_sizes", "_unsafe_view", "_reshape_alias", "lift_fresh"),
    )
)
"""What torch may do between ops without a recording missing it."""
_MAY_COMPUTE_NOTHING = frozenset(("to", "float", "contiguous", "reshape", "flatten"))
"""Where these return what they were given."""


class CallStruct(ctypes.Structure):
    _fields_ = [("op", c_int64), ("args", c_int64 * 8)]


class Tape:
    """The calls of one step, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._calls: list[CallStruct] = []
        self._kept: list[Any] = []

    def add(self, op: str, args: Sequence[Any], kept: Sequence[Any]) -> None:
        """Notes a call; `kept` is what its addresses lie in."""
        self._kept.extend(kept)
        self.names.append(op)
        self._calls.append(CallStruct(_CODES[op], (c_int64 * 8)(*map(self._number, args))))

    def calls(self) -> ctypes.Array[CallStruct]:
        return (CallStruct * len(self._calls))(*self._calls)

    def _number(self, value: Any) -> int:
        if value is None:
            return 0
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            value = c_double(value)
        self._kept.append(value)
        return ctypes.addressof(value)


class _Watch(TorchDispatchMode):
    """Sees whether torch computes anything itself."""

    def __init__(self) -> None:
        super().__init__()
        self.has_seen = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; else torch imports its compiler at the first decode, which
        takes seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_same = name in _MAY_COMPUTE_NOTHING and result is args[0]
        self.has_seen = self.has_seen or not (is_same or name in _COMPUTES_NOTHING)
        return result


def watched(body: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Returns what `body` returns, and whether torch computed anything in it."""
    watch = _Watch()
    with watch:
        result = body()
    return result, watch.has_seen
