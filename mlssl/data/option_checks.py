"""Check set options against each other before any file is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from mlssl.choices import DatasetName
from mlssl.data.absent import absent_values
from mlssl.data.records import check_class_names
from mlssl.data.set_options import SetOptions, SplitOptions, as_list

OF_FORMATS = {
    **dict.fromkeys(("separator", "path_column", "label_columns", "absent"), ("manifest",)),
    "white": ("coco", "roboflow", "voc", "manifest", "folder", "shards"),
}
"""File options → the formats that they apply to."""

_FORMATS: tuple[str, ...] = get_args(DatasetName)


def check_options(options: SetOptions, probe: SplitOptions | None = None) -> None:
    """Refuse options that are out of range or conflict.

    Args:
        options: Options of the training set and, if any, the val set.
        probe: Options of a labelled set for the probe.

    Raises:
        ValueError: Names the options.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    absent_values(options.absent)
    if options.white is not None and not 0 < options.white < math.inf:
        raise ValueError(f"white={options.white} was given: pass a white level above 0.")
    if options.classes is not None:
        if not options.classes:
            raise ValueError("classes=[] was given: pass at least one name, or leave it out.")
        check_class_names(options.classes)
    if options.dataset is not None and options.dataset not in _FORMATS:
        raise ValueError(
            f"dataset={options.dataset!r} is unknown: pass one of {', '.join(_FORMATS)}, or train=Records(…)."
        )
    if options.annotations is None:
        _check_root(options, given)
    elif options.root is not None:
        raise ValueError(
            "root and annotations were given: pass the folder of the images as images (--data.images), or root alone."
        )
    elif options.dataset not in (None, "synthetic", "coco", "manifest"):
        raise ValueError(
            f"annotations and dataset={options.dataset!r} were given: the format is read from the file, leave dataset "
            "out."
        )
    if isinstance(options, SplitOptions):
        _check_val(options)
        if probe is not None:
            _check_probe(options, probe)


def check_numbers(**numbers: tuple[float | None, int]) -> None:
    """Refuse numbers below their minimum.

    Args:
        **numbers: (number or None, minimum) by name.

    Raises:
        ValueError: Names the number.
    """
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} was given: pass a number of at least {least}.")


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of evaluation images, from a pair or one side.

    Raises:
        ValueError: Not one or two numbers of at least 1.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"eval_size={size} was given: pass height and width in pixels, at least 1 each.")
    return both


def _check_probe(options: SplitOptions, probe: SplitOptions) -> None:
    check_options(probe)
    if (probe.dataset or "synthetic") == "synthetic" and probe.annotations is None:
        raise ValueError(
            "probe does not name a set: pass dataset and root, or annotations (--data.probe.dataset coco)."
        )
    if probe.dataset == "folder":
        raise ValueError("probe is a folder, which has no labels: pass a labelled set, or leave probe out.")
    for name in ("val_annotations", "val_fraction", "min_images_per_class"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} and probe were given: the probe has a validation set, pass it as probe.{name}.")
    if options.val_split:
        raise ValueError("val_split and probe were given: the probe has a validation set, pass it as probe.val_split.")


def _check_root(options: SetOptions, given: Mapping[str, object]) -> None:
    dataset, roots = options.dataset or "synthetic", as_list(options.root)
    for name in ("images", "val_annotations", "val_images"):
        if name in given:
            raise ValueError(f"{name}={given[name]!r} was given without annotations: pass annotations too.")
    if not roots and dataset != "synthetic":
        raise ValueError(f"dataset={dataset!r} needs its folder: pass root (--data.root FOLDER).")
    if roots and dataset == "synthetic":
        others = ", ".join(name for name in _FORMATS if name != "synthetic")
        raise ValueError(
            f"root={options.root!r} was given, and synthetic scenes have no files: pass its dataset, one of {others}."
        )
    if len(roots) > 1 and dataset == "shards":
        raise ValueError(f"root={options.root!r} has several folders, and shards take one: pack the sets together.")
    if options.classes is not None and dataset == "folder":
        raise ValueError("classes and dataset='folder' were given: a folder has no labels, leave classes out.")
    for name, formats in OF_FORMATS.items():
        if name in given and dataset not in formats:
            raise ValueError(
                f"{name}={given[name]!r} and dataset={dataset!r} were given: {name} is for {', '.join(formats)}, "
                "leave it out."
            )


def _check_val(options: SplitOptions) -> None:
    ways = [name for name in ("val_split", "val_annotations", "val_fraction") if getattr(options, name) is not None]
    if len(ways) > 1:
        raise ValueError(f"{' and '.join(ways)} were given: each defines the validation set, keep one of them.")
    if options.val_images is not None and options.val_annotations is None:
        raise ValueError(f"val_images={options.val_images!r} was given without val_annotations: pass both.")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise ValueError(
            f"val_fraction={options.val_fraction} was given: pass a fraction between 0 and 1, such as 0.1."
        )
