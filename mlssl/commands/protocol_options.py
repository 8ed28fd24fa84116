"""Which options of `mlssl linear` a protocol fixes, and which it has no use for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.data.set_options import SplitOptions
from mlssl.evaluation.protocols import Protocol

_FIXED = (*(name for name in SplitOptions.__dataclass_fields__ if name != "root"), "eval_size", "threshold")
"""Options that every protocol fixes."""

_OF_FEATURES = ("pooling", "batch_size", "fractions", "pos_weight")
"""Options that a protocol with a classifier of its own has no use for."""


def options_of_protocol(protocol: Protocol, options: EvaluationOptions) -> EvaluationOptions:
    """The options with what a protocol fixes."""
    dataset: Any = protocol.dataset
    return replace(
        options,
        dataset=dataset,
        train_split=protocol.train_split,
        val_split=protocol.test_split,
        eval_size=protocol.eval_size,
        min_images_per_class=protocol.min_images_per_class,
    )


def refuse_ignored(protocol: Protocol | None, given: Mapping[str, Any]) -> None:
    """Refuse options that would change nothing.

    Args:
        protocol: That was asked for.
        given: All options of the command; None for one that was not given.

    Raises:
        ValueError: If the protocol fixes one that was given, or has no use for it.
    """
    if given["epochs"] is not None and (protocol is None or protocol.classifier != "sgd"):
        raise ValueError(
            f"--epochs {given['epochs']} was given, and nothing is trained by epochs here: leave it out, or pass a "
            "protocol that trains, --protocol coco-448 or voc12-to-voc07"
        )
    if protocol is None:
        return
    ignored, more = list(_FIXED), ""
    if protocol.classifier != "logistic":
        ignored += [*_OF_FEATURES, *(["cache"] if protocol.classifier == "sgd" else [])]
        more = ", and how images become features and scores"
    wrong = [name for name in ignored if given[name] is not None]
    if given["dataset"] == protocol.dataset:
        wrong.remove("dataset")
    if wrong:
        options = " and ".join(f"--{name}" for name in wrong)
        raise ValueError(
            f"{protocol.name} fixes data set, splits, sizes, classes and threshold{more}: leave out {options}, or the "
            "protocol"
        )
