"""Cosines by kind against a slow loop, ranks and maps of sets with known shape."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mlssl.evaluation.geometry import effective_rank, feature_spectrum, map_2d, pair_cosines, spread


def test_cosines_equal_those_of_a_slow_loop():
    z = torch.randn(3, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    expected: dict[str, list[float]] = {"same_block": [], "same_image": [], "other_image": []}
    views = [(i, a, k) for i in range(3) for a in range(2) for k in range(2)]
    for one in views:
        for other in views:
            if one == other:
                continue
            kind = "other_image" if one[0] != other[0] else "same_block" if one[2] == other[2] else "same_image"
            expected[kind].append(F.cosine_similarity(z[one], z[other], dim=0).item())
    found = pair_cosines(z)
    assert found.keys() == expected.keys()
    for kind, cosines in found.items():
        assert sorted(cosines.tolist()) == pytest.approx(sorted(expected[kind]), abs=1e-5)


def test_a_measure_without_pairs_is_left_out():
    assert pair_cosines(torch.randn(1, 2, 1, 4)).keys() == {"same_block"}


def test_rank_counts_directions_and_is_one_for_zeros():
    assert effective_rank(torch.ones(7)).item() == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0, 0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(4)).item() == pytest.approx(1)


def test_spread_is_one_on_the_sphere_and_zero_at_a_point():
    assert spread(torch.ones(50, 8)).item() == 0
    assert spread(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))).item() == pytest.approx(
        1, abs=0.02
    )


def test_the_spectrum_ignores_the_mean_of_all_images():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(feature_spectrum(features), feature_spectrum(features + 100), atol=1e-3)
    assert feature_spectrum(torch.ones(5, 3)).max().item() == 0


def test_the_map_is_a_principal_component_analysis():
    from sklearn.decomposition import PCA

    features = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) + 1
    places, shares = map_2d(features)
    reference = PCA(2).fit(F.normalize(features, dim=1).numpy())
    expected = torch.from_numpy(reference.transform(F.normalize(features, dim=1).numpy()))
    assert torch.allclose(places.abs(), expected.abs(), atol=1e-4)
    assert shares == pytest.approx(tuple(reference.explained_variance_ratio_), abs=1e-4)
    assert all(places[places[:, axis].abs().argmax(), axis] > 0 for axis in (0, 1))


@pytest.mark.parametrize("features", [torch.ones(1, 4), torch.ones(6, 4), torch.randn(5, 1)])
def test_the_map_of_a_degenerate_set_is_finite(features):
    places, shares = map_2d(features)
    assert places.shape == (len(features), 2)
    assert places.isfinite().all()
    assert all(math.isfinite(share) for share in shares)
