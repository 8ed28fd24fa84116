"""The collapse monitor: what it measures, when, and its messages."""

from __future__ import annotations

import csv
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlssl.callbacks import CollapseMonitor
from mlssl.callbacks import collapse as collapse_file
from mlssl.evaluation.collapse import collapse_measures

Make = Callable[..., Any]


class Constant(nn.Module):
    """A collapsed backbone: every image gives the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.ones(12))

    def forward(self, images: Tensor) -> Tensor:
        return self.features.expand(len(images), -1)


# ---------------------------------------------------------------------- what it measures


def test_cosines_are_those_of_a_loop_over_all_pairs() -> None:
    z = random_z(3, 2, 4, 5)
    pairs: dict[str, list[float]] = {"same_block": [], "same_image": [], "other_image": []}
    indices = [(b, a, k) for b in range(3) for a in range(2) for k in range(4)]
    for one in indices:
        for other in indices:
            if one != other:
                kind = "other_image" if one[0] != other[0] else "same_block" if one[2] == other[2] else "same_image"
                pairs[kind].append(torch.cosine_similarity(z[one], z[other], dim=0).item())
    measures = collapse_measures(z)
    for kind, cosines in pairs.items():
        assert measures[kind].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_std_is_1_where_views_spread_over_the_sphere_and_0_in_one_point() -> None:
    assert collapse_measures(random_z(64, 2, 4, 32))["std"].item() == pytest.approx(1, abs=0.02)
    assert collapse_measures(random_z(1, 1, 1, 32).expand(64, 2, 4, 32))["std"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("directions", [1, 2, 7])
def test_rank_counts_directions_of_equal_variance(directions: int) -> None:
    z = torch.eye(16)[torch.arange(8 * 2 * 7) % directions].view(8, 2, 7, 16)
    assert collapse_measures(z)["rank"].item() == pytest.approx(directions, rel=1e-5)


def test_the_scale_of_projections_does_not_matter() -> None:
    z = random_z(6, 2, 4, 8)
    lengths = random_z(6, 2, 4, 1).exp()
    for name, value in collapse_measures(z * lengths).items():
        torch.testing.assert_close(value, collapse_measures(z)[name])


@pytest.mark.parametrize(
    ("shape", "missing"),
    [((4, 2, 1, 8), {"same_image"}), ((1, 2, 4, 8), {"other_image"}), ((4, 1, 1, 8), {"same_block", "same_image"})],
)
def test_a_measure_without_pairs_is_left_out(shape: tuple[int, ...], missing: set[str]) -> None:
    kinds = {"std", "rank", "same_block", "same_image", "other_image"}
    measures = collapse_measures(random_z(*shape))
    assert measures.keys() == kinds - missing
    assert all(math.isfinite(value) for value in measures.values())


def test_only_the_first_1024_views_are_measured_but_at_least_two_images() -> None:
    z = random_z(300, 2, 4, 8)
    assert collapse_measures(z) == collapse_measures(z[:128])
    many_blocks = random_z(3, 2, 600, 4)
    assert collapse_measures(many_blocks) == collapse_measures(many_blocks[:2])


def test_half_precision_and_zero_projections_give_finite_measures() -> None:
    z = random_z(8, 2, 4, 16)
    torch.testing.assert_close(collapse_measures(z.bfloat16())["std"], collapse_measures(z)["std"], atol=0.01, rtol=0)
    zeros = collapse_measures(torch.zeros(4, 2, 4, 8))
    assert zeros["std"] == 0
    assert zeros["rank"] == 1


# ---------------------------------------------------------------------- when it measures


def test_it_measures_only_at_logged_steps(
    make_model: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(collapse_file, "collapse_measures", lambda z: calls.append(z) or collapse_measures(z))
    trainer = make_trainer(CollapseMonitor(), log_every_n_steps=3)
    trainer.fit(make_model(), make_data())
    assert trainer.global_step == 8
    assert [tuple(z.shape) for z in calls] == [(4, 2, 4, 16)] * 2

    rows = csv.DictReader((Path(trainer.default_root_dir) / "metrics.csv").read_text().splitlines())
    logged = {row["step"]: row for row in rows if row["collapse/std"]}
    assert logged.keys() == {"2", "5"}  # Lightning counts from 0
    for step, z in zip(("2", "5"), calls, strict=True):
        for name, value in collapse_measures(z).items():
            assert float(logged[step][f"collapse/{name}"]) == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


def test_a_run_that_logs_nothing_is_not_measured(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(CollapseMonitor(min_std=1.0, stop=True), log_every_n_steps=0)
    trainer.fit(make_model(), make_data())
    assert trainer.global_step == 8


def test_features_are_measured_without_projections(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_model()
    step = model.training_step

    def without_projections(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        del outputs["projections"]
        return outputs

    model.training_step = without_projections
    trainer = make_trainer(CollapseMonitor())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # features after a ReLU point one way
        trainer.fit(model, make_data())
    assert trainer.callback_metrics["collapse/other_image"] > 0.5


def test_steps_that_return_neither_are_reported_once(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"]
    with caplog.at_level(logging.INFO):
        make_trainer(CollapseMonitor()).fit(model, make_data())
    lines = [line for line in caplog.messages if line.startswith("CollapseMonitor")]
    assert lines == ["CollapseMonitor: the training step returns neither projections nor features to measure."]


# ---------------------------------------------------------------------- what it says


def test_a_healthy_run_is_not_warned_of(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(CollapseMonitor(stop=True))
    trainer.fit(make_model(), make_data())  # warnings are errors
    assert trainer.global_step == 8
    assert trainer.callback_metrics["collapse/std"] > 0.5


def test_a_collapsed_run_is_warned_of_once(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(CollapseMonitor())
    with pytest.warns(UserWarning, match=r"collapsing at step 2: .* nearly equal \(spread 0.00.*rank 1.0") as caught:
        trainer.fit(make_model(backbone=Constant()), make_data())
    (warning,) = (str(one.message) for one in caught if "collapsing" in str(one.message))
    assert warning.endswith(
        "Try stop_gradient=True, a lower base_lr, a larger batch_size or a larger contrastive_weight."
    )
    assert trainer.global_step == 8


def test_a_collapse_to_one_line_is_detected_by_its_rank(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    class TwoPoints(nn.Module):
        """Spread 1, but the views are at ±u, the same block on the same side."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.where(images.mean((1, 2, 3), keepdim=True)[:, 0, 0] > 0, 1.0, -1.0).expand(-1, 12)

    model = make_model(backbone=TwoPoints())
    model.projector = nn.Linear(12, 16, bias=False)
    monitor = CollapseMonitor()
    with pytest.warns(UserWarning, match=r"spread 0.[5-9].*effective rank 1.0, healthy from 2"):
        make_trainer(monitor).fit(model, make_data(batch_size=8))


def test_it_stops_the_training_on_request(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(CollapseMonitor(stop=True))
    with pytest.warns(UserWarning, match="collapsing at step 2"):
        trainer.fit(make_model(backbone=Constant()), make_data())
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_std": -0.1}, "min_std=-0.1 was given: pass a number from 0"),
        ({"min_std": 1.1}, "min_std=1.1"),
        ({"min_std": math.nan}, "min_std=nan"),
        ({"min_rank": 0.9}, "min_rank=0.9 was given: pass at least 1"),
        ({"min_rank": math.nan}, "min_rank=nan"),
    ],
)
def test_thresholds_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseMonitor(**settings)


def test_thresholds_at_the_edges_are_accepted() -> None:
    assert CollapseMonitor(min_std=0, min_rank=1).min_rank == 1
    assert CollapseMonitor(min_std=1).min_std == 1


def random_z(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
