"""Tables of an evaluation on made-up numbers: differences, rare classes, files and the plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from mlssl.commands.evaluation import with_run_size
from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.results import BackboneResult, differences, print_positives, print_table, write_results
from mlssl.drawing.classes import Bars, draw_average_precision
from mlssl.evaluation.bootstrap import interval_of, resample
from mlssl.evaluation.classes import ClassCounts
from mlssl.evaluation.metrics import average_precision
from mlssl.weights.sources import Backbone

CLASSES = ClassCounts(["sky $5 to $9", "hot dog", "toaster"], [40, 9, 0], [30, 9, 0])


def found(name: str, noise: float) -> BackboneResult:
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(60, 3, dtype=torch.int8)
    for column, positives in enumerate(CLASSES.test):
        targets[:positives, column] = 1
    scores = targets + noise * torch.randn(60, 3, generator=generator)
    resampled = resample(scores, targets, num_resamples=100)
    by_class = average_precision(scores, targets)
    mean = by_class.nanmean().item()
    numbers = {"mAP": mean, "interval": interval_of(resampled.means, mean)}
    return BackboneResult(name, {"mAP": f"{mean:.3f}"}, numbers, by_class, resampled)


@pytest.fixture(scope="module")
def three() -> list[BackboneResult]:
    return [found("resnet18 (untrained)", 2.0), found("runs/a", 0.6), found("runs/b", 0.6)]


def test_every_pair_is_compared_on_the_same_resamples(
    three: list[BackboneResult], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = differences(three)
    pairs = [("runs/a", "resnet18 (untrained)"), ("runs/b", "resnet18 (untrained)"), ("runs/b", "runs/a")]
    assert [(one.numbers["of"], one.numbers["minus"]) for one in rows] == pairs
    low, high = rows[0].numbers["interval"]
    assert 0 < low < rows[0].numbers["mAP"] < high
    assert "holds 0" not in rows[0].columns
    assert rows[2].numbers["interval"] == (0, 0)
    assert rows[2].columns["holds 0"] == "yes"
    assert differences(three[:1]) == []
    print_table([], "difference")
    print_table(rows, "difference")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "difference                     mAP     95 % interval, paired  holds 0"
    assert lines[1].startswith("runs/a − resnet18 (untrained)  +0.")
    assert lines[3].endswith("+0.000 to +0.000       yes")


def test_rare_classes_are_counted_and_marked_and_a_long_list_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_positives(CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "positives in the test images; 2 of 3 classes, marked *, have fewer than 10 and are left"
    )
    assert lines[1] == "  sky $5 to $9 30, hot dog 9*, toaster 0*"
    names = [f"class {number}" for number in range(5000)]
    print_positives(ClassCounts(names, [3] * 5000, list(range(5000))))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  class 4999 4999, class 4998 4998, ")
    assert lines[-1].endswith("and 4900 more in classes.csv")
    assert max(map(len, lines[1:])) <= 80
    assert len(lines) < 30


def test_files_contain_what_the_screen_shows(three: list[BackboneResult], tmp_path: Path) -> None:
    folder = write_results(str(tmp_path), "linear", three, differences(three), CLASSES, {"seed": 0})
    content = json.loads((folder / "results.json").read_text())
    assert content["positives"]["hot dog"] == {"train": 9, "test": 9, "rare": True}
    assert content["positives"]["sky $5 to $9"]["rare"] is False
    first = content["results"][0]
    assert first["source"] == "resnet18 (untrained)"
    assert first["frequent_mAP"] == first["average_precision"]["sky $5 to $9"], "the only class that is not rare"
    assert first["average_precision"]["toaster"] is None
    low, high = first["average_precision_interval"]["hot dog"]
    assert 0 <= low < high <= 1
    assert [one["minus"] for one in content["differences"]] == [
        "resnet18 (untrained)",
        "resnet18 (untrained)",
        "runs/a",
    ]
    with (folder / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["test positives"] for row in rows] == ["30", "9", "0"]
    assert [row["training positives"] for row in rows] == ["40", "9", "0"]
    with (folder / "differences.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    alone = write_results(str(tmp_path), "linear", three[:1], [], CLASSES, {})
    assert not (alone / "differences.csv").exists()


def test_the_legend_does_not_cover_the_bars_and_classes_have_counts_and_intervals(
    three: list[BackboneResult], tmp_path: Path
) -> None:
    bars = [Bars(one.source, one.average_precision, one.resampled.class_intervals) for one in three]
    figure = draw_average_precision(tmp_path / "bars.png", bars, CLASSES)
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sky \\$5 to \\$9 30", "hot dog 9*"]
    segments = axes.collections[0].get_segments()
    assert [end for line in segments for end in line[:, 1]] == pytest.approx(bars[0].ends[:2].flatten().tolist())


def test_the_size_of_images_is_that_of_the_first_run_unless_one_is_given() -> None:
    network = torch.nn.Identity()
    plain, small, other = (Backbone(network, history={"data": text}) for text in ("{}", '{"size": 64}', '{"size": 32}'))
    of_corel = Backbone(network, history={"data": '{"size": 64, "eval_size": [128, 192]}'})
    options = EvaluationOptions()
    assert with_run_size(options, [plain, Backbone(network)]).eval_size is None
    assert with_run_size(options, [plain, small, other]).eval_size == 64
    assert with_run_size(options, [of_corel]).eval_size == (128, 192)
    assert with_run_size(EvaluationOptions(eval_size=48), [small]).eval_size == 48
