"""Random streams of views: each depends only on its root, branch and block, and all differ."""

from __future__ import annotations

import numpy as np
import pytest

from mlssl.views.streams import LOCAL_VIEWS, RESERVED, Streams

TAGS = [(root, branch) for root in (0, 1, 2**64 - 1) for branch in (0, 1, LOCAL_VIEWS)]


@pytest.mark.parametrize(("root", "branch"), TAGS)
def test_the_numbers_of_a_block_do_not_depend_on_other_blocks_or_earlier_samples(root: int, branch: int) -> None:
    streams = Streams()
    four = streams.uniforms(root, branch, 4, RESERVED)
    streams.uniforms(root, branch + 1, 9, 20)
    assert streams.uniforms(root, branch, 2, 30) == [numbers[:30] for numbers in four[:2]]
    assert Streams().uniforms(root, branch, 4, RESERVED) == four


@pytest.mark.parametrize(("root", "branch"), TAGS)
def test_a_generator_does_not_depend_on_another(root: int, branch: int) -> None:
    first, other = Streams.generator(root, branch, 3), Streams.generator(root, branch, 4)
    numbers = [first.random(), other.random(), first.random()]
    again = Streams.generator(root, branch, 3)
    assert [again.random(), again.random()] == [numbers[0], numbers[2]]
    assert numbers[1] not in (numbers[0], numbers[2])
    one, two = (Streams.generator(root, branch, block).spawn(1)[0].random() for block in (3, 4))
    assert Streams.generator(root, branch, 3).spawn(1)[0].random() == one != two


def test_streams_have_nothing_in_common() -> None:
    uniforms = [numbers for tag in TAGS for numbers in Streams().uniforms(*tag, 4, RESERVED)]
    generators = [Streams.generator(*tag, block).random(RESERVED) for tag in TAGS for block in range(4)]
    table = np.array([*uniforms, *generators])
    assert len(np.unique(table)) == table.size
    correlations = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlations).max() < 5.5 / RESERVED**0.5
    assert table.mean() == pytest.approx(0.5, abs=5 / (12 * table.size) ** 0.5)
