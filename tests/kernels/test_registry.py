"""Which back end is chosen, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.errors import ConfigError
from octavo.kernels.cpu import native
from octavo.kernels.registry import BACKENDS, select_ops, unfit_reasons


@pytest.fixture
def _unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)


def test_every_back_end_carries_its_name() -> None:
    for name, reason in unfit_reasons().items():
        if reason is None:
            assert select_ops(name, 1).name == name


def test_auto_takes_the_first_that_fits() -> None:
    fitting = [name for name, reason in unfit_reasons().items() if reason is None]
    assert select_ops("auto", 1).name == fitting[0]


@pytest.mark.usefixtures("_unbuilt")
def test_auto_falls_back_where_the_kernels_are_not_built() -> None:
    ops = select_ops("auto", 3)
    assert ops.name == "reference"
    assert ops.torch_threads == 3


@pytest.mark.usefixtures("_unbuilt")
def test_a_named_back_end_that_does_not_fit_is_refused_with_all_candidates() -> None:
    with pytest.raises(ConfigError, match=r"native: .*not built.*reference: fits") as caught:
        select_ops("native", 1)
    assert caught.value.field == "attention_backend"


def test_an_unknown_name_is_refused_with_all_candidates() -> None:
    with pytest.raises(ConfigError, match="'flash' is unknown") as caught:
        select_ops("flash", 1)
    assert all(name in str(caught.value) for name in BACKENDS)


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "library_path", lambda: broken)
    assert "_native.so" in (native.unfit_reason() or "")
