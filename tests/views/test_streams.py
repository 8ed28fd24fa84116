"""Random streams of views: the same in both ways to get one, and none like another."""

from __future__ import annotations

import numpy as np
import pytest

from mlssl.views.streams import LOCAL_VIEWS, Streams


@pytest.mark.parametrize("root", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("branch", [0, 1, LOCAL_VIEWS])
def test_a_shared_stream_is_the_one_of_a_new_generator(root: int, branch: int) -> None:
    streams = Streams()
    streams.shared(root, 0, 9).random(5)
    streams.shared(root, 0, 9).integers(5, dtype=np.uint32)  # leaves half a number behind
    np.testing.assert_array_equal(streams.shared(root, branch, 3).random(50), Streams.own(root, branch, 3).random(50))


def test_streams_of_neighbours_have_nothing_in_common() -> None:
    tags = [(root, branch, block) for root in (0, 1, 2) for branch in (0, 1, LOCAL_VIEWS) for block in range(4)]
    numbers = np.array([Streams.own(*tag).random(1000) for tag in tags])
    assert len(np.unique(numbers)) == numbers.size
    correlations = np.corrcoef(numbers) - np.eye(len(tags))
    assert np.abs(correlations).max() < 5 / 1000**0.5
    assert numbers.mean() == pytest.approx(0.5, abs=5 / (12 * numbers.size) ** 0.5)


def test_children_of_a_stream_are_its_own() -> None:
    one, again, other = (Streams.own(5, 0, block).spawn(1)[0].random() for block in (1, 1, 2))
    assert one == again != other
