"""Which back end is chosen, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.errors import ConfigError
from octavo.kernels.cpu import native
from octavo.kernels.registry import BACKENDS, Needs, select_ops, unfit_reasons


@pytest.fixture
def _unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)


def test_every_back_end_carries_its_name() -> None:
    for name, reason in unfit_reasons(Needs()).items():
        if reason is None:
            assert select_ops(name, Needs()).name == name


def test_auto_takes_the_first_that_fits() -> None:
    fitting = [name for name, reason in unfit_reasons(Needs()).items() if reason is None]
    assert select_ops("auto", Needs()).name == fitting[0]


@pytest.mark.usefixtures("_unbuilt")
def test_auto_falls_back_where_the_kernels_are_not_built() -> None:
    ops = select_ops("auto", Needs(num_threads=3))
    assert ops.name == "reference"
    assert ops.torch_threads == 3


@pytest.mark.usefixtures("_unbuilt")
def test_a_named_back_end_that_does_not_fit_is_refused_with_all_candidates() -> None:
    with pytest.raises(ConfigError, match=r"native: .*not built.*reference: fits") as caught:
        select_ops("native", Needs())
    assert caught.value.field == "attention_backend"


def test_an_unknown_name_is_refused_with_all_candidates() -> None:
    with pytest.raises(ConfigError, match="'flash' does not fit") as caught:
        select_ops("flash", Needs())
    assert all(name in str(caught.value) for name in BACKENDS)


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "library_path", lambda: broken)
    assert "_native.so" in (native.unfit_reason() or "")


def test_a_gpu_takes_triton_and_says_why_not_the_others() -> None:
    needs = Needs(device=torch.device("cuda:0"), head_sizes=(64, 512))
    with pytest.raises(ConfigError, match=r"native: it computes on the CPU; ") as caught:
        select_ops("auto", needs)
    assert "heads of 512 are larger than 256" in str(caught.value) or "not inst" in str(
        caught.value
    )
