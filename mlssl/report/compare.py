"""One page that compares runs: settings that differ, shared plots, and linear probes with intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlssl.choices import Pooling
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.drawing import run as figures
from mlssl.evaluation.bootstrap import interval_of, resample
from mlssl.evaluation.frozen import POOLING
from mlssl.evaluation.probe import linear_probe
from mlssl.report.content import LOSSES, plot_of
from mlssl.report.facts import as_text, facts_of
from mlssl.report.measure import features_of, some_images, usable_pooling
from mlssl.report.networks import network_at_end
from mlssl.report.page import Page, Plot, Table, write_page
from mlssl.report.run import plain_settings, reason_not_to_measure, words_of_images, workers
from mlssl.run_folder import Log, last_checkpoint, read_config, read_log
from mlssl.weights.checkpoints import check_content, load_checkpoint

_PARTS = ("recipe", "seed_everything", "model_class", "model", "data_class", "data", "trainer", "optimizer")
"""Compared entries of a config."""

_OF_IMAGES = ("dataset", "root", "train_split", "val_split", "min_images_per_class")
"""Data settings that must be equal for a comparison on the same images."""

_CURVES = {
    "train/lr": ("lr", "Learning rate", "learning rate", True),
    "throughput/images_per_s": ("speed", "Speed", "images/s", True),
    "probe/mAP": ("probe", "Online probe", "mAP", False),
    "knn/mAP": ("knn", "Online kNN", "mAP", False),
}
"""Logged metric → name, title and unit of its plot, and whether its y axis starts at 0."""

_BY_EPOCH = ("probe/mAP", "knn/mAP")


class _Run(NamedTuple):
    folder: Path
    config: dict[str, Any]
    log: dict[str, Log]
    content: Mapping[str, Any]
    checkpoint: Path


def write_comparison(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    max_images: int = 2000,
    num_workers: int | None = None,
    progress: bool = False,
    trust: bool = False,
    eval_size: tuple[int, int] | None = None,
    pooling: Pooling = POOLING,
) -> Path:
    """Write one HTML file that compares several runs of `mlssl fit`.

    Args:
        runs: Run folders, at least two.
        output: File to write; an existing file is replaced.
        max_images: Maximum number of training images and of val images for the probes, evenly spaced; at least 2.
        num_workers: Loader processes; the first run's setting by default.
        progress: Whether to show progress bars.
        trust: Whether to fetch images from a URL in a config.
        eval_size: Height and width that whole images are resized to; the first run's setting by default.
        pooling: Pooling of the features.

    Returns:
        The file.

    Raises:
        FileNotFoundError: A folder, one of its files or the images are missing.
        ValueError: Fewer than two runs are given, one is given twice or is not a run, or max_images is below 2.
    """
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ValueError(f"{len(folders)} runs were given, or one of them twice: pass two or more different runs.")
    if max_images < 2:
        raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave it out for 2000.")
    opened = {_name(folder, folders): _opened(folder) for folder in folders}
    how = {"num_workers": num_workers, "progress": progress, "eval_size": eval_size, "pooling": pooling}
    tables, notes = _quality(opened, max_images, trust, how)
    page = Page(
        title=f"{len(opened)} runs",
        subtitle=", ".join(opened),
        verdicts=[],
        facts={},
        curves=_curves(opened),
        quality=[],
        notes=notes,
        tables=[*tables, differing_settings({name: run.config for name, run in opened.items()}), _facts(opened)],
        version=version("mlssl"),
    )
    write_page(page, Path(output))
    return Path(output)


def differing_settings(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Table of the settings that differ between runs.

    Args:
        configs: Run name → config.
    """
    flat = [_flat({part: config.get(part) for part in _PARTS}) for config in configs.values()]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(settings.get(name, "–") for settings in flat)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    caption = "Settings of model, data and Trainer that differ between runs. –: not set in this run."
    return Table("What differs", caption if rows else "No setting differs.", ["setting", *configs], rows)


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, one in value.items():
        if isinstance(one, Mapping) and one:
            found |= _flat(one, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = as_text(one)
    return found


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's name, or its path if several folders share the name."""
    own = folder.resolve().name
    return own if sum(one.resolve().name == own for one in folders) == 1 else str(folder)


def _opened(folder: Path) -> _Run:
    config, checkpoint = read_config(folder), last_checkpoint(folder)
    content = load_checkpoint(checkpoint)
    check_content(content, checkpoint)
    return _Run(folder, config, read_log(folder), content, checkpoint)


def _facts(runs: Mapping[str, _Run]) -> Table:
    facts = [facts_of(run.folder, run.config, run.log) for run in runs.values()]
    names = list(dict.fromkeys(name for one in facts for name in one))
    return Table("The runs", "", ["", *runs], [[name, *(one.get(name, "–") for one in facts)] for name in names])


def _curves(runs: Mapping[str, _Run]) -> list[Plot]:
    plots = []
    losses = {
        title: {name: (run.log[key].steps, run.log[key].values) for name, run in runs.items() if key in run.log}
        for key, title in LOSSES.items()
    }
    losses = {title: curves for title, curves in losses.items() if curves}
    if losses:
        figure = figures.figure_of_panels(losses)
        plots.append(plot_of("loss", "Loss", "Losses under different settings are not comparable.", figure))
    for key, (name, title, unit, from_zero) in _CURVES.items():
        logs = {run_name: run.log[key] for run_name, run in runs.items() if key in run.log}
        if not logs:
            continue
        by_epoch = key in _BY_EPOCH
        curves = {one: (log.epochs if by_epoch else log.steps, log.values) for one, log in logs.items()}
        figure = figures.figure_of_curves(curves, unit, "epoch" if by_epoch else "step", from_zero=from_zero)
        plots.append(plot_of(name, title, "As logged by each run.", figure))
    return plots


def _quality(
    runs: Mapping[str, _Run], max_images: int, trust: bool, how: Mapping[str, Any]
) -> tuple[list[Table], list[str]]:
    """Linear probes of all runs on the same images, with intervals, and all pairwise differences."""
    first = next(iter(runs.values()))
    for run in runs.values():
        reasons = reason_not_to_measure(run.config, run.content, run.checkpoint, trust)
        if reasons:
            return [], [f"{run.folder.name}: {reasons[0]}"]
        other = [name for name in _OF_IMAGES if run.config["data"].get(name) != first.config["data"].get(name)]
        if other:
            return [], [f"The runs differ in data.{other[0]}, so they cannot be scored on the same images."]
    settings, _ = plain_settings(first.config["data"])
    seed = int(first.config["seed_everything"])
    data = MultiLabelDataModule(**settings, seed=seed)
    data.setup()
    train, val = data.train_records, data.val_records
    if train is None or val is None or train.labels is None or val.labels is None or not (val.labels == 1).any():
        return [], ["The runs are not compared by a probe: the training or the val set has no labels."]
    train, val = some_images(train, max_images), some_images(val, max_images)
    size = how["eval_size"] or data.eval_size
    networks = {name: network_at_end(run.content, run.checkpoint) for name, run in runs.items()}
    usable = [usable_pooling(network.backbone, how["pooling"]) for network in networks.values()]
    pooling = usable[0] if len(set(usable)) == 1 else "avg"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    means, estimates = {}, {}
    for name, network in networks.items():
        loading: dict[str, Any] = {"num_workers": workers(data, how["num_workers"]), "pooling": pooling}
        bank, shown = (
            features_of(
                network.to(device), one, size, **loading, progress=f"{name}, {split}" if how["progress"] else ""
            )
            for split, one in (("train", train), ("val", val))
        )
        probe = linear_probe(bank, shown, num_resamples=0, seed=seed)
        assert shown.labels is not None
        means[name] = resample(probe.scores, shown.labels, seed=seed).means
        estimates[name] = probe.mAP
    rows = []
    for name, mean in means.items():
        low, high = interval_of(mean, estimates[name])
        rows.append([name, f"{estimates[name]:.3f}", f"{low:.3f}–{high:.3f}"])
    pairs = [(b, a) for index, b in enumerate(means) for a in list(means)[:index]]
    differences = []
    for later, earlier in pairs:
        value = estimates[later] - estimates[earlier]
        low, high = interval_of(means[later] - means[earlier], value)
        distinct = "no" if low <= 0 <= high else "yes"
        differences.append([f"{later} − {earlier}", f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", distinct])
    caption = (
        f"Linear probes on frozen features: trained on {len(train):,} training images, scored on {len(val):,} val "
        f"images. {words_of_images(size, pooling)} Intervals: 95 %, bootstrap over the val images."
    )
    paired = "Both runs on the same resamples. The intervals do not include the variance between training seeds."
    return [
        Table("How good are the features?", caption, ["run", "probe mAP", "95 % interval"], rows),
        Table("Differences", paired, ["runs", "mAP", "95 % interval, paired", "excludes 0"], differences),
    ], []
