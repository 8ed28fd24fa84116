"""Checks of received files: plain values only, no imports and no downloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

OWN_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""Written into hyper-parameters by LightningCLI itself, which ignores it when reading them."""

WEIGHTS_TO_READ = frozenset(
    {"pretrained", "checkpoint_path", "cache_dir", "weights", "pretrained_cfg", "pretrained_cfg_overlay"}
)
"""Backbone arguments that read or download weights; mlssl never writes them into a checkpoint or an export."""

MAX_DEPTH = 100
MAX_VALUES = 1_000_000
"""Maximum number of hyper-parameter values; a file can repeat one list until it exceeds memory."""

_NAMES_OF_CODE = ("_instantiator", "_class_path", "class_path")
_HUB = ("hf-hub:", "hf_hub:")


def check_names_no_code(values: object, source: object) -> None:
    """Refuse hyper-parameters that name a class or function to import, at any depth, or are too large.

    Args:
        values: Mappings, lists and plain values.
        source: Their file, for errors.

    Raises:
        ValueError: Names the key or the bound.
    """
    waiting, count = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(
                f"The hyper-parameters of {source} are nested more than {MAX_DEPTH} deep or have more than "
                f"{MAX_VALUES:,} values: pass a checkpoint written by mlssl fit."
            )
        named = next((key for key in _NAMES_OF_CODE if isinstance(value, Mapping) and key in value), None)
        if named is not None:
            raise ValueError(
                f"The hyper-parameters of {source} name code to import ({named!r}), which those of mlssl fit never do: "
                "nothing was imported; pass a checkpoint written by mlssl fit."
            )
        waiting += [(one, depth + 1) for one in inside(value)]


def check_downloads_nothing(values: Mapping[str, Any], source: object) -> None:
    """Refuse values that would cause a network request or read other files.

    These are addresses (``https://…``, ``hf-hub:…``), and the arguments `WEIGHTS_TO_READ` in a mapping such as
    ``backbone_kwargs``.

    Args:
        values: Name → value.
        source: Their file, for errors.

    Raises:
        ValueError: Names the value and how to pass it explicitly.
    """
    for name, value in values.items():
        asked = next((leaf for leaf in leaves_of(value) if is_remote(leaf)), None)
        if asked is None:
            asked = next((key for key, one in _entries(value) if key in WEIGHTS_TO_READ and one), None)
        if asked is not None:
            raise ValueError(
                f"{source} asks for {name} with {asked!r}, which may cause a download, so nothing was downloaded: if "
                f"you trust it, pass {name} yourself, as --model.{name} or load_from_checkpoint(path, {name}=…)."
            )


def check_statistics(mean: object, std: object, source: object) -> None:
    """Refuse pixel statistics that are not lists of finite numbers, std above 0; None is accepted.

    Raises:
        ValueError: Names them.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is None:
            continue
        plain = isinstance(numbers, (list, tuple)) and numbers and all(type(one) in (int, float) for one in numbers)
        if not plain or not all(math.isfinite(one) and (one > 0 or name == "mean") for one in numbers):  # type: ignore[attr-defined]
            raise ValueError(
                f"{source} has {name}={numbers!r:.80}, where one finite number per channel is expected, std above 0: "
                "the file was changed or is damaged, pass another."
            )


def is_remote(value: object) -> bool:
    """Whether a value is a network address.

    >>> [is_remote(text) for text in ("hf-hub:timm/resnet18", "s3://bucket/photos", "reference::x", "resnet18", 3)]
    [True, True, True, False, False]
    """
    return isinstance(value, str) and (value.strip().startswith(_HUB) or "://" in value or "::" in value)


def leaves_of(value: object) -> Iterator[object]:
    """All leaf values in nested mappings, lists and tuples."""
    if isinstance(value, (Mapping, list, tuple)):
        for one in inside(value):
            yield from leaves_of(one)
    else:
        yield value


def inside(value: object) -> Iterator[object]:
    """Values of a mapping or items of a list; empty for anything else."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


def _entries(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, Mapping):
        yield from value.items()
    for one in inside(value):
        yield from _entries(one)
