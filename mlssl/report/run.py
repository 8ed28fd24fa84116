"""Write the report of a run from its folder: plots of its log, and measurements of its initial and trained network.

Nothing that a run names is imported. The backbone of a custom module is read from the checkpoint, custom branches and
regions are replaced by the library's, and the images of a custom datamodule are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlssl.choices import Pooling
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.evaluation.frozen import POOLING
from mlssl.received import WEIGHTS_TO_READ, is_remote, leaves_of
from mlssl.report.content import Measurements, build_page
from mlssl.report.measure import measure, some_images, usable_pooling
from mlssl.report.networks import network_at_end, network_at_start
from mlssl.report.page import write_page
from mlssl.run_folder import last_checkpoint, read_config, read_log
from mlssl.weights.checkpoints import architecture, check_content, load_checkpoint

_VIEWS = ("branches", "regions", "local_views")
"""Data settings that may name a user's code or files."""


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_images: int = 2000,
    num_workers: int | None = None,
    progress: bool = False,
    trust: bool = False,
    eval_size: tuple[int, int] | None = None,
    pooling: Pooling = POOLING,
) -> Path:
    """Write one HTML file about a run of `mlssl fit`.

    Two networks are measured on the run's data: that of the last checkpoint, and the initial network, rebuilt from the
    run's seed and settings. For the library's class the rebuilt network is exact.

    Args:
        run: Run folder, with config.yaml, metrics.csv and checkpoints/.
        output: File to write; an existing file is replaced. By default ``report.html`` in the run folder.
        max_images: Maximum number of training images and of val images to measure, evenly spaced; at least 2.
        num_workers: Loader processes; the run's setting by default.
        progress: Whether to show progress bars with images per second.
        trust: Whether to read and download what the run's config names: published initial weights, and images at a URL.
        eval_size: Height and width that whole images are resized to; the run's setting by default.
        pooling: Pooling of the features; "avg" if the backbone has no accessible feature map.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The folder, one of its files or the images are missing.
        ValueError: max_images is below 2, the config is not that of a run, or the checkpoint does not match it.
    """
    if max_images < 2:
        raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave it out for 2000.")
    folder = Path(run)
    config, checkpoint = read_config(folder), last_checkpoint(folder)
    content = load_checkpoint(checkpoint)
    check_content(content, checkpoint)
    measurements, notes = None, reason_not_to_measure(config, content, checkpoint, trust)
    if not notes:
        how = {"num_workers": num_workers, "progress": progress, "eval_size": eval_size, "pooling": pooling}
        measurements, notes = _measure(config, content, checkpoint, max_images, trust, how)
    path = Path(output) if output is not None else folder / "report.html"
    write_page(build_page(folder, config, read_log(folder), measurements, notes), path)
    return path


def reason_not_to_measure(
    config: Mapping[str, Any], content: Mapping[str, Any], checkpoint: Path, trust: bool
) -> list[str]:
    """Why the network or the images are not accessible without importing what the run names; empty if they are."""
    if not _of_library(config, "data_class"):
        return [
            f"The images come from {config['data_class']}, which the report does not import, so only the log is shown."
        ]
    if not trust and any(map(is_remote, leaves_of(config["data"]))):
        return [
            f"The images are at {config['data'].get('root')!r}, which the report does not fetch unless you pass "
            "--trust true, so only the log is shown."
        ]
    try:
        architecture(content, checkpoint)
    except ValueError as error:
        return [f"Only the log is shown, because the network cannot be rebuilt: {error}"]
    return []


def _measure(
    config: Mapping[str, Any],
    content: Mapping[str, Any],
    checkpoint: Path,
    max_images: int,
    trust: bool,
    how: Mapping[str, Any],
) -> tuple[Measurements, list[str]]:
    seed = int(config["seed_everything"])
    end = network_at_end(content, checkpoint)
    of_library = _of_library(config, "model_class")
    arguments = (config["model"].get("backbone_kwargs") or {}) if of_library else None
    settings, notes = plain_settings(config["data"])
    try:
        reads = sorted(name for name, value in (arguments or {}).items() if name in WEIGHTS_TO_READ and value)
        start = network_at_start(content, checkpoint, seed, None if reads and not trust else arguments)
        data = MultiLabelDataModule(**settings, seed=seed)
        batch_size = int(settings.get("batch_size", data.hparams["batch_size"]))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The settings in {checkpoint.parent.parent / 'config.yaml'} are not those of a run "
            f"({' '.join(str(error).split()) or type(error).__name__}): restore the file that mlssl fit wrote."
        ) from error
    if reads and not trust:
        notes.append(
            f"The run started from weights that its config names ({', '.join(reads)}), which the report reads only if "
            "you pass --trust true: its start is shown as a new network of this architecture."
        )
    if not of_library:
        notes.append(
            "The start of the run is a new network of this architecture, built with the run's seed: "
            f"{config['model_class']} is not imported, and may have started from other weights."
        )
    if not end.has_projector:
        notes.append("The run does not use the library's projector: views are compared by features of the backbone.")
    data.setup()
    assert data.train_records is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = some_images(data.train_records, max_images)
    val = None if data.val_records is None else some_images(data.val_records, max_images)
    size = how["eval_size"] or data.eval_size
    measured: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers(data, how["num_workers"]),
        "seed": seed,
        "pooling": usable_pooling(end.backbone, how["pooling"]),
    }
    notes.append(words_of_images(size, measured["pooling"]))
    names = ("at the start", "at the end") if how["progress"] else ("", "")
    first, last = (
        measure(one.to(device), train, val, data.views, size, **measured, progress=name)
        for one, name in zip((start, end), names, strict=True)
    )
    return Measurements(first, last, data.train_records, data.val_records, train), notes


def workers(data: MultiLabelDataModule, num_workers: int | None) -> int:
    """Loader processes: the given number, or the run's."""
    return data.image_dataloader("train").num_workers if num_workers is None else num_workers


def words_of_images(size: tuple[int, int], pooling: str) -> str:
    """Size and pooling of the features, as `mlssl linear` prints them."""
    return f"Features are of whole images of {size[0]} × {size[1]} pixels, pooling {pooling}."


def _of_library(config: Mapping[str, Any], name: str) -> bool:
    """Whether a class of the run is the library's, which is the default if the config does not name one."""
    return str(config.get(name) or "mlssl").partition(".")[0] == "mlssl"


def plain_settings(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Datamodule settings without those that name a user's code or files, and a note if any were dropped."""
    settings = {name: value for name, value in data.items() if name not in _VIEWS or _is_plain(value)}
    settings.pop("local_views", None)  # the report does not show them
    left_out = [name for name in _VIEWS[:2] if name in data and name not in settings]
    for name in ("eval_size", "min_images_per_class"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    if not left_out:
        return settings, []
    return settings, [
        f"The run's {' and '.join(left_out)} are custom, which the report does not import: cosines, spread and rank "
        "are of views with the library's default instead."
    ]


def _is_plain(value: object) -> bool:
    """Whether a setting contains only numbers and preset names, without import paths, class paths or files."""
    if isinstance(value, str):
        return value.isidentifier()
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else True
