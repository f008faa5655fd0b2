"""A step's arrays arrive as they were, aligned, whatever is under way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.runner.transfer import RING_SLOTS, make_transfer, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("lens", [(), (0,), (1,), (4, 4), (3, 0, 17, 1, 8)])
def test_packed_arrays_lie_at_multiples_of_sixteen_bytes(lens: tuple[int, ...]) -> None:
    parts = [np.arange(length) + 100 * i for i, length in enumerate(lens)]
    packed, places = pack(parts)
    assert packed.dtype == np.int32
    assert all(place.start * packed.itemsize % 16 == 0 for place in places)
    for part, place in zip(parts, places, strict=True):
        np.testing.assert_array_equal(packed[place], part)


def test_uploads_and_downloads_under_way_do_not_mix() -> None:
    transfer = make_transfer(DEVICE)
    downloads = []
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 1000, 5 + 3001 * (i % 13)).astype(np.int32) for i in range(60)]
    assert len(sent) > 4 * RING_SLOTS
    for array in sent:
        with transfer.step():
            there = transfer.upload(array)
            downloads.append(transfer.download([there * 2, there[:3] + 1]))
        array += 1  # the caller's array is its own again
    for array, download in zip(sent, downloads, strict=True):
        doubled, first = download.wait()
        np.testing.assert_array_equal(doubled, (array - 1) * 2)
        np.testing.assert_array_equal(first, array[:3])
