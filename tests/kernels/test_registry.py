"""Which back end is chosen, and what is said where none fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from octavo.errors import ConfigError
from octavo.formats import kv_formats
from octavo.kernels import limits
from octavo.kernels.cpu import library
from octavo.kernels.cpu.fingerprint import fingerprint
from octavo.kernels.limits import AttentionWants, attention_wants, check_backend
from octavo.kernels.registry import BACKENDS, Needs, select_ops, unfit_reasons
from octavo.visibility import Chunk, Full, Window


@pytest.fixture
def _unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)


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
    monkeypatch.setattr(library, "library_path", lambda: broken)
    assert "_native.so" in (library.unfit_reason() or "")


def test_a_library_of_other_sources_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library.library_path() is None:
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(library, "fingerprint", lambda folder: "another")
    for name in ("auto", "native"):
        with pytest.raises(ConfigError, match=r"here another.*build_ext --inplace") as caught:
            select_ops(name, Needs())
        assert caught.value.field == "attention_backend"
    assert select_ops("reference", Needs()).name == "reference"
    monkeypatch.setattr(library, "fingerprint", lambda folder: None)  # a wheel has no sources
    assert library.unfit_reason() is None


def test_a_fingerprint_knows_every_source_and_nothing_else(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None
    found: list[str | None] = []
    for name, text in (("a.cpp", "x"), ("b.h", "y"), ("a.cpp", "xy"), ("b.h", "")):
        (tmp_path / name).write_text(text)
        found.append(fingerprint(tmp_path))
        (tmp_path / "note.py").write_text(text)
        assert fingerprint(tmp_path) == found[-1]
    assert len(set(found)) == 4


def test_a_gpu_takes_triton_and_says_why_not_the_others() -> None:
    wants = AttentionWants(head_sizes=frozenset((64, 512)))
    needs = Needs(device=torch.device("cuda:0"), attention=wants)
    with pytest.raises(ConfigError, match=r"native: it computes on the CPU; ") as caught:
        select_ops("auto", needs)
    assert "heads of 512 are larger than 256" in str(caught.value) or "not inst" in str(
        caught.value
    )


PLAIN = attention_wants(head_size=64, visibility=Window(128))
ODD = {
    "attention in chunks": attention_wants(head_size=64, visibility=Chunk(128)),
    "attention sinks": attention_wants(head_size=64, visibility=Full(), has_sinks=True),
    "keys without rotation": attention_wants(head_size=64, visibility=Full(), is_rotated=False),
    "soft caps of scores": attention_wants(head_size=64, visibility=Full(), soft_cap=50.0),
}


@pytest.mark.parametrize("feature", sorted(ODD))
def test_the_specification_attends_for_every_layer(feature: str) -> None:
    assert ODD[feature].features == {feature}
    assert select_ops("reference", Needs(attention=ODD[feature])).name == "reference"
    check_backend("reference", "cpu", ODD[feature])


@pytest.mark.parametrize("feature", sorted(ODD))
def test_a_gpu_that_lacks_a_feature_is_refused_by_the_plan_and_the_load(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = AttentionWants.of_all((PLAIN, ODD[feature]))
    check_backend("auto", "cuda", wants)
    monkeypatch.setitem(limits._SERVED, "triton", frozenset())
    with pytest.raises(ConfigError, match=f"it has no {feature}; use --device cpu") as caught:
        check_backend("auto", "cuda", wants)
    assert caught.value.field == "device"
    reasons = unfit_reasons(Needs(attention=wants))
    assert reasons["reference"] is None
    if "not installed" not in (reasons["triton"] or "") and "GPU" not in (reasons["triton"] or ""):
        assert reasons["triton"] == f"it has no {feature}"


def test_what_no_layer_wants_is_not_asked_of_a_back_end() -> None:
    assert PLAIN.features == frozenset()
    for backend, device in (("auto", "cuda"), ("triton", "cuda"), ("native", "cpu")):
        check_backend(backend, device, PLAIN)


def test_latent_vectors_that_a_gpu_cannot_quantise_are_refused_at_start() -> None:
    latent = AttentionWants(vector_sizes=frozenset((512, 48)), rotated_sizes=frozenset((48,)))
    wants = dataclasses.replace(latent, features=frozenset((limits.AttentionFeature.LATENT,)))
    for name in ("fp8", "int8"):
        asked = dataclasses.replace(wants, kv=kv_formats(name))
        match = f"kv_cache_dtype {name} .*power of two rotated numbers, and there are 48.*use float"
        with pytest.raises(ConfigError, match=match) as caught:
            limits.check_kv_formats("auto", "cuda", asked)
        assert caught.value.field == "kv_cache_dtype"
        limits.check_kv_formats("auto", "cpu", asked)
    limits.check_kv_formats("auto", "cuda", dataclasses.replace(wants, kv=kv_formats("bfloat16")))
    even = dataclasses.replace(wants, rotated_sizes=frozenset((64,)), kv=kv_formats("fp8"))
    limits.check_kv_formats("auto", "cuda", even)
