"""The summary that `mlssl fit` prints at its end: quality, duration, files, and next commands."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from mlssl.callbacks import OnlineLinearProbe
from mlssl.callbacks.step_summary import Rows, block
from mlssl.contracts import FeatureNetwork
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.set_options import COMMON, SplitOptions
from mlssl.distributed import is_sharded
from mlssl.durations import in_words
from mlssl.evaluation.frozen import frozen_sets
from mlssl.evaluation.probe import linear_probe
from mlssl.report.measure import some_images
from mlssl.run_folder import Log, read_log
from mlssl.weights.checkpoints import take_weights

MAX_IMAGES = 2000
"""Maximum number of images of each set for the comparison of networks."""

MIN_IMAGES = 100
"""Minimum number of images for a meaningful comparison."""

SHARE = 0.1
"""Images of each set per image seen in the run, so that the comparison takes a small part of the run's time."""


def describe_end(cli: Any, folder: Path, seconds: float, steps_before: int) -> str:
    """The summary as text.

    Args:
        cli: `RunCLI` after its fit.
        folder: Folder of the run.
        seconds: Duration of the fit.
        steps_before: Steps of the run before this fit.
    """
    trainer, data = cli.trainer, cli.datamodule
    steps = trainer.fit_loop.epoch_loop.batch_progress.total.completed - steps_before
    comparison, start_name = None, "untrained network"
    if isinstance(data, MultiLabelDataModule) and has_probe(trainer, cli.model):
        most = images_to_compare(steps * data.hparams["batch_size"] * trainer.world_size)
        if most:
            start = start_of_run(type(cli.model), cli.model_settings, int(cli.settings.seed_everything))
            source = cli.settings.start_from
            if source is not None:
                take_weights(start, source)
            if source is not None or cli.settings.model.get("backbone_kwargs"):
                start_name = "network at the start"
            comparison = compare(start, cli.model, data, most)
    return end_block(folder, seconds, steps, comparison, start_name, next_commands(folder, data))


_KEPT_SETTINGS = ("batch_size", "size", "eval_size", "num_workers", "timeout", "on_bad_image")


class Comparison(NamedTuple):
    """Linear probes on frozen features of the network at its start and at its end, mAP on the same val images."""

    start: float
    end: float
    train_images: int
    val_images: int


def compare(start: FeatureNetwork, end: FeatureNetwork, data: MultiLabelDataModule, most: int) -> Comparison | None:
    """Fit a linear probe on the frozen features of both networks.

    Args:
        start: The network before the first step.
        end: The network now.
        data: The run's datamodule, set up.
        most: Most images of each set.

    Returns:
        None where a set has no labels, or too few images that show a class.
    """
    train, val = data.train_records, data.val_records
    if train is None or val is None or train.labels is None or val.labels is None:
        return None
    train, val = some_images(train, most), some_images(val, most)
    settings: dict[str, Any] = {name: data.hparams[name] for name in _KEPT_SETTINGS}
    try:
        some = MultiLabelDataModule(train=train, val=val, **settings)
        loaders = some.image_dataloader("train"), some.image_dataloader("val")
        before, after = (
            linear_probe(*frozen_sets(model, *loaders, pooling="avg", name=name), num_resamples=0).mAP
            for name, model in (("untrained", start), ("pre-trained", end))
        )
    except ValueError:  # the sets are too small for their classes
        return None
    return Comparison(before, after, len(train), len(val))


def images_to_compare(seen: int) -> int:
    """Images of each set to compare on, from the images the run has seen; 0 if too few for a result.

    >>> images_to_compare(500), images_to_compare(4000), images_to_compare(10**6)
    (0, 400, 2000)
    """
    number = min(MAX_IMAGES, int(SHARE * seen))
    return number if number >= MIN_IMAGES else 0


def has_probe(trainer: L.Trainer, model: L.LightningModule) -> bool:
    """Whether this run probes the backbone and the backbone is not sharded."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    probes = [one for one in callbacks if isinstance(one, OnlineLinearProbe) and one.is_of_backbone]
    return bool(probes) and not is_sharded(trainer.strategy.model or model)


def start_of_run(kind: type[Any], settings: dict[str, Any], seed: int) -> Any:
    """Build the network that a run starts from; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**settings)


def end_block(
    folder: Path, seconds: float, steps: int, comparison: Comparison | None, start_name: str, commands: list[str]
) -> str:
    """The summary as text, from its parts.

    Args:
        folder: Folder of the run.
        seconds: Duration of the fit.
        steps: Steps of the fit.
        comparison: Result of `compare`, or None.
        start_name: Name of the network at the start, such as "untrained network".
        commands: Two commands to run next.
    """
    rows: Rows = []
    scores = read_log(folder).get("probe/mAP")
    if scores is not None:
        rows.append(("probe", _describe_scores(scores)))
    if comparison is not None:
        rows.append(
            (
                "compared",
                f"linear probe on frozen features, fitted on {comparison.train_images} training images, mAP on "
                f"{comparison.val_images} val images: {start_name} {comparison.start:.3f}, trained network "
                f"{comparison.end:.3f} ({comparison.end - comparison.start:+.3f})",
            )
        )
    folders = [name for name in ("exports", "checkpoints", "views") if (folder / name).is_dir()]
    rows.append(("time", f"{in_words(seconds)} for {steps} steps"))
    rows.append(("folder", f"{folder}, with metrics.csv{''.join(f', {name}/' for name in folders)}"))
    return block(rows) + "\n\n" + "\n".join(["next:", *(f"  {command}" for command in commands)])


def next_commands(folder: Path, data: L.LightningDataModule) -> list[str]:
    """A report of the run, then an evaluation on the run's labelled images, or without labels an export."""
    report = ["mlssl", "report", str(folder)]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return [shlex.join(report)]
    options = _linear_options(data)
    if options is None:
        written = folder / "exports" / "of-last.safetensors"
        return [shlex.join(report), shlex.join(["mlssl", "export", str(checkpoint), "-o", str(written)])]
    return [shlex.join(report), shlex.join(["mlssl", "linear", str(checkpoint), *options])]


def _linear_options(data: L.LightningDataModule) -> list[str] | None:
    """Options of `mlssl linear` for the run's data; None if it lacks one that was given, or the data has no labels."""
    if not isinstance(data, MultiLabelDataModule):
        return None
    sets, given = (data.train_records, data.val_records), data.hparams
    others = [field.name for field in fields(SplitOptions) if field.name not in COMMON]
    is_labelled = all(records is not None and records.labels is not None for records in sets)
    if not is_labelled or not isinstance(given["root"], str | None) or any(given.get(name) for name in others):
        return None
    options = ["--dataset", given["dataset"]]
    for name in ("root", "train_split", "val_split", "min_images_per_class"):
        if given[name] is not None:
            value = given[name]
            options += [f"--{name}", str(list(value) if isinstance(value, tuple) else value)]
    height, width = data.eval_size
    return [*options, "--eval_size", str(height) if height == width else f"[{height},{width}]"]


def _describe_scores(scores: Log) -> str:
    best = max(range(len(scores.values)), key=lambda index: scores.values[index])
    epoch = int(scores.epochs[best]) + 1
    return f"best mAP {scores.values[best]:.3f} in epoch {epoch}, {scores.values[-1]:.3f} at the end"
