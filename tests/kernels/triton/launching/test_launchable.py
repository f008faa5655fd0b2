"""Launches that go around Triton's front end: what is looked up, encoded once, and handed over.

The compiled kernel is a fake, the wrapper around its launcher Triton's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton.interpreter import triton  # isort: skip
from triton.backends.nvidia import driver
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.launching import building, chip, tensor_maps
from octavo.kernels.triton.launching.launchable import launchable
from octavo.observe.progress import Progress

assert triton


class Memory:
    """What a descriptor asks of a tensor on a GPU."""

    def __init__(self, address: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return 0


class Function:
    """A jitted function that counts how often its front end is asked."""

    arg_names = ("x", "rows", "count", "BLOCK")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.num_asked = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def front_end(*arguments: Any, **constants: Any) -> Any:
            self.num_asked += 1
            signature = dict(enumerate(("tensordesc<>", "tensordesc<>", "i32", "constexpr")))
            launcher = lambda *a: self.launches.append(a)
            wrapped = driver.wrap_handle_tensordesc(launcher, signature, ["first", "second"])
            run = SimpleNamespace(
                global_scratch_size=0,
                profile_scratch_size=0,
                launch_cooperative_grid=False,
                launch_pdl=True,
                launch=wrapped,
            )
            return SimpleNamespace(function=5, packed_metadata=(4, 1, 9), run=run)

        return front_end


def _rows(address: int, block: list[int], shape: tuple[int, ...] = (64, 128)) -> TensorDescriptor:
    return TensorDescriptor(Memory(address), list(shape), [shape[1], 1], block)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    done: list[tuple[int, str]] = []

    def encode(argument: Any, metadata: str) -> list[Any]:
        done.append((argument.base.data_ptr(), metadata))
        return [f"map {len(done)}", *argument.shape, *argument.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return done


def test_descriptors_are_encoded_once_and_handed_over_in_their_place(
    encoded: list[tuple[int, str]],
) -> None:
    function = Function()
    kernel = launchable(function)
    layout = NVMMASharedLayout(128, 16, 2)
    page = LaidOutDescriptor(Memory(1024), [64, 128], [128, 1], [16, 64], layout)
    for count in (3, 3, 5):
        kernel[(7, 2)](_rows(512, [16, 64]), page, count, BLOCK=32)
    assert function.num_asked == 1
    assert encoded == [(512, "first"), (1024, "second")]
    head = (7, 2, 1, 77, 5, False, True, None, None, (4, 1, 9), None, None, None)
    maps = ("map 1", 64, 128, 128, 1, "map 2", 64, 128, 128, 1)
    assert function.launches == [(*head, *maps, 3, 32), (*head, *maps, 5, 32)]
    kernel[(1,)](_rows(512, [16, 64], (32, 128)), page, 3, BLOCK=32)
    assert len(encoded) == 3, "another shape is another map"
    assert function.num_asked == 1, "but the same binary"


def test_what_decides_the_binary_is_asked_anew(encoded: list[tuple[int, str]]) -> None:
    function = Function()
    kernel = launchable(function)
    x = _rows(512, [16, 64])
    wide, narrow = (NVMMASharedLayout(width, 16, 2) for width in (128, 64))
    others = [
        _rows(512, [32, 64]),
        TensorDescriptor(Memory(512, torch.float16), [64, 128], [128, 1], [16, 64]),
        LaidOutDescriptor(Memory(512), [64, 128], [128, 1], [16, 64], wide),
        LaidOutDescriptor(Memory(512), [64, 128], [128, 1], [16, 64], narrow),
    ]
    for other in (x, *others):
        kernel[(1,)](x, other, 3, BLOCK=32)
        kernel[(1,)](x, other, 3, BLOCK=32)
    assert function.num_asked == 5
    assert len(function.launches) == 5
    assert len(encoded) == 10


def test_whoever_watches_is_told_of_launches_that_may_build(encoded: list[tuple[int, str]]) -> None:
    told: list[str] = []

    class Told(Progress):
        @contextmanager
        def building(self) -> Iterator[None]:
            told.append("begins")
            yield
            told.append("ends")

    function = Function()
    kernel = launchable(function)
    context = copy_context()  # what is told here is told to nobody else
    context.run(building.tell_builds, Told())
    for _ in range(3):
        context.run(lambda: kernel[(1,)](_rows(512, [16, 64]), _rows(64, [16, 64]), 3, BLOCK=32))
    assert function.num_asked == 1
    assert told == ["begins", "ends"]


@pytest.mark.parametrize("change", ["version", "launcher"])
def test_a_launcher_of_another_triton_is_left_to_its_front_end(
    encoded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "version":
        monkeypatch.setattr(chip, "KNOWN_TRITON", "3.5.")
    else:
        monkeypatch.setattr(driver, "wrap_handle_tensordesc", lambda launcher, *_: launcher)
    function = Function()
    kernel = launchable(function)
    for _ in range(3):
        kernel[(1,)](_rows(512, [16, 64]), _rows(1024, [16, 64]), 3, BLOCK=32)
    assert function.num_asked == 3
    assert not encoded
    assert not function.launches


def test_no_more_maps_are_kept_than_the_bound(
    encoded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_maps, "MAX_TENSOR_MAPS", 3)
    kernel = launchable(Function())
    for address in (512, 1024, 1536, 2048, 2048):
        kernel[(1,)](_rows(512, [16, 64]), _rows(address, [16, 64]), 3, BLOCK=32)
    # The first launch is Triton's own; the map of the fourth drops those before it.
    assert [address for address, _ in encoded] == [512, 1024, 1536, 2048, 512]


class Buildable(Function):
    """Notes how it was asked for a binary alone."""

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        assert warmup, "it would be launched"
        self.num_asked += 1


def test_within_building_each_binary_is_asked_for_once_and_nothing_runs(
    encoded: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "can_build", lambda: True)
    function, other = Buildable(), Buildable()
    kernel = launchable(function)
    x = _rows(512, [16, 64])
    for _ in range(2):
        kernel[(1,)](x, x, 5, BLOCK=32)  # known, and still not to be run below
    assert (function.num_asked, len(function.launches)) == (1, 1)
    with building.building(2):
        assert building.is_building()
        for count in (3, 5, 16, 32, 1):
            kernel[(7,)](x, x, count, BLOCK=32)
        launchable(other)[(7,)](x, x, 3, BLOCK=32)
    assert not building.is_building()
    assert (function.num_asked, other.num_asked) == (1 + 3, 1)
    assert len(function.launches) == 1
    kernel[(1,)](x, x, 5, BLOCK=32)
    assert len(function.launches) == 2


def test_building_ends_with_the_error_of_who_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "can_build", lambda: True)
    with pytest.raises(ValueError, match="shape"), building.building(1):
        raise ValueError("a shape that does not fit")
    assert not building.is_building()
    with building.building(1):
        pass
