"""Read sets from their options: choose the reader and the splits of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlssl.data.annotation_files import Source, annotation_source
from mlssl.data.decoding import decode_rgb, decode_rgb_bytes
from mlssl.data.joined import held_out, joined, with_classes_named
from mlssl.data.option_checks import OF_FORMATS
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.corel5k import frequent_labels, read_corel5k
from mlssl.data.readers.folder import read_folder
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.roboflow import has_split as has_roboflow
from mlssl.data.readers.roboflow import read_roboflow
from mlssl.data.readers.shards import has_split as has_shards
from mlssl.data.readers.shards import read_shards
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.readers.voc import VOC_CLASSES, read_voc
from mlssl.data.records import Records
from mlssl.data.set_options import SetOptions, SplitOptions, as_list

NUM_SCENES = {"train": 2000, "test": 500}
"""Synthetic scenes per split: a few minutes of training, and a test set read in seconds."""


def read_train(options: SetOptions) -> Records:
    """Read the training set.

    Args:
        options: Options that passed `check_options`.

    Raises:
        ValueError: A split or class is unknown, sets cannot be joined, or a reader refuses its files.
        FileNotFoundError: A folder or file is missing.
    """
    if options.annotations is not None:
        files = as_list(options.annotations)
        return _read([annotation_source(one, options.images, options, options.train_split) for one in files], options)
    return _read(_sources(options, options.train_split, lambda kind, _: kind.train), options)


class Sets(NamedTuple):
    """The sets of a run."""

    train: Records
    val: Records | None
    probe_train: Records | None


def read_sets(options: SplitOptions, probe: SplitOptions | None = None) -> Sets:
    """Read the training set and the validation set, None if neither options nor format define one.

    Args:
        options: Options that passed `check_options`.
        probe: Options of a labelled set: its training set is for the probe, its val set is the val set.

    Raises:
        ValueError: As `read_train`; also no class is frequent enough, or the probe's set has no labels or no val set.
        FileNotFoundError: A folder or file is missing.
    """
    if probe is None:
        return Sets(*_read_both(options), None)
    learned, val = _read_both(probe)
    if val is None or learned.labels is None or val.labels is None:
        raise ValueError(
            "the probe's set has no labels or no validation images: pass one with both, or hold some out, "
            "probe.val_fraction=0.2 (--data.probe.val_fraction 0.2)"
        )
    return Sets(read_train(options), val, learned)


def _read_both(options: SplitOptions) -> tuple[Records, Records | None]:
    train = read_train(options)
    if options.val_fraction is not None:
        train, held = held_out(train, options.val_fraction)
        val: Records | None = held
    else:
        val = _read_val(options, train.classes or None)
    if options.min_images_per_class is None:
        return train, val
    least_train, least_val = options.min_images_per_class
    if val is None:
        raise ValueError(
            f"min_images_per_class={options.min_images_per_class} needs val images, and there are none: leave it out."
        )
    kept = frequent_labels(train, val, least_train, least_val)
    if not kept:
        raise ValueError(f"No class has {least_train} train and {least_val} val images: lower min_images_per_class.")
    return train.with_classes(kept), val.with_classes(kept)


def _read_val(options: SplitOptions, classes: Sequence[str] | None) -> Records | None:
    if options.annotations is not None:
        files, split = as_list(options.val_annotations), options.val_split or None
        images = options.images if options.val_images is None else options.val_images
        if split is not None:  # a split of the same files
            files, images = as_list(options.annotations), options.images
        sources = [annotation_source(one, images, options, split) for one in files]
    elif options.val_split == "":
        return None
    else:
        sources = _sources(options, options.val_split, lambda kind, root: kind.val(root))
    try:
        return _read(sources, options, classes) if sources else None
    except FileNotFoundError as error:
        if options.val_split is not None or options.annotations is not None:
            raise
        missing, split = str(error).rpartition(": ")[0], _FORMATS[options.dataset or "synthetic"].val(".")
        raise FileNotFoundError(  # without the reader's advice, which might suggest the training set
            f'there is no validation set {split!r} ({missing}): pass val_split="" (--data.val_split "") to train '
            "without one, val_fraction=0.1 (--data.val_fraction 0.1) to hold images out, or a val_split whose images "
            "are not trained on"
        ) from error


def _read(sources: Sequence[Source], options: SetOptions, classes: Sequence[str] | None = None) -> Records:
    """Read sources as one set.

    Args:
        sources: At least one.
        options: Their ``classes``, if given, are the ones to keep.
        classes: Classes of the training set, for a val set.
    """
    names, chosen = [one.name for one in sources], options.classes
    if chosen is not None:
        sets = [
            one.read(chosen, True) if one.is_open else with_classes_named(one.read(None, False), chosen, one.name)
            for one in sources
        ]
        without = next((name for name, records in zip(names, sets, strict=True) if records.labels is None), None)
        if without is not None:
            raise ValueError(f"classes={chosen} were given, and {without!r} has no labels: leave classes out")
        return joined(sets, names)
    sets = [one.read(classes, False) for one in sources]
    named = {name for records in sets for name in records.classes}
    if classes is None and len({records.classes for records in sets}) > 1:
        # An open list does not show the classes of other lists; a closed one declares its own classes.
        sets = [
            one.read(sorted(named), False) if one.is_open else records
            for one, records in zip(sources, sets, strict=True)
        ]
    order = sets[0].classes if classes is None else tuple(classes)
    for index, records in enumerate(sets):
        if records.classes != order and set(records.classes) == set(order):
            sets[index] = with_classes_named(records, order, names[index])
    return joined(sets, names)


class _Format(NamedTuple):
    read: Callable[..., Records]
    """Takes root, split, classes or None, whether to leave out labels of other classes, and format options."""

    train: str
    val: Callable[[str], str | None]
    """Default val split of a root; None for none."""

    is_open: bool = False
    """See `Source.is_open`."""


def _sources(options: SetOptions, split: str | None, default: Callable[[_Format, str], str | None]) -> list[Source]:
    """One source per root, for the given split or else the format's default split, if any."""
    dataset = options.dataset or "synthetic"
    kind = _FORMATS[dataset]
    how: dict[str, Any] = {name: getattr(options, name) for name in OF_FORMATS if getattr(options, name) is not None}
    white = how.pop("white", None)
    if white is not None:
        how["decode"] = partial(decode_rgb_bytes if dataset == "shards" else decode_rgb, white=white)
    sources = []
    for root in as_list(options.root) or ["."]:
        chosen = default(kind, root) if split is None else split
        if chosen is not None:
            read = partial(_read_root, kind, root, chosen, how)
            sources.append(Source(root if dataset != "synthetic" else "synthetic", read, kind.is_open))
    return sources


def _read_root(
    kind: _Format,
    root: str,
    split: str,
    how: dict[str, Any],
    classes: Sequence[str] | None,
    leave_out_others: bool,
) -> Records:
    return kind.read(root, split, classes, leave_out_others, **how)


_FORMATS = {
    "synthetic": _Format(
        lambda _, split, *__: synthetic_scenes(split, count=NUM_SCENES.get(split, 1)), "train", lambda _: "test"
    ),
    "coco": _Format(lambda root, split, *_, **how: read_coco(root, split, **how), "train2017", lambda _: "val2017"),
    "roboflow": _Format(
        lambda root, split, classes, _, **how: read_roboflow(root, split, classes, **how),
        "train",
        lambda root: "valid" if has_roboflow(root, "valid") else None,
    ),
    "voc": _Format(
        lambda root, split, classes, leave_out, **how: read_voc(
            root, split, classes if leave_out else VOC_CLASSES, leave_out_others=leave_out, **how
        ),
        "2012/trainval",
        lambda _: "2007/test",
        is_open=True,
    ),
    "corel5k": _Format(lambda root, split, *_: read_corel5k(root, split), "train", lambda _: "test"),
    "manifest": _Format(
        lambda root, split, classes, leave_out, **how: read_manifest(
            Path(root) / split, classes, leave_out_others=leave_out, **how
        ),
        "train.csv",
        lambda _: "val.csv",
        is_open=True,
    ),
    "folder": _Format(lambda root, split, *_, **how: read_folder(Path(root) / split, **how), "", lambda _: None),
    "shards": _Format(
        lambda root, split, *_, **how: read_shards(root, split, **how),
        "train",
        lambda root: "val" if has_shards(root, "val") else None,
    ),
}
