"""Options of `mlssl linear` that a protocol fixes or does not use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.data.set_options import SplitOptions
from mlssl.evaluation.protocols import Protocol

_FIXED = (*(name for name in SplitOptions.__dataclass_fields__ if name != "root"), "eval_size", "threshold")
"""Options that every protocol fixes."""

_FEATURE_OPTIONS = ("pooling", "batch_size", "fractions", "pos_weight")
"""Options that a protocol with its own classifier does not use."""


def options_of_protocol(protocol: Protocol, options: EvaluationOptions) -> EvaluationOptions:
    """The options, with those that the protocol fixes."""
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
        protocol: Protocol that was given, or None.
        given: All options of the command; the value of one that was not given is None.

    Raises:
        ValueError: If the protocol fixes an option that was given, or does not use it.
    """
    if given["epochs"] is not None and (protocol is None or protocol.classifier != "sgd"):
        raise ValueError(
            f"--epochs {given['epochs']} was given, but nothing is trained by epochs here: leave it out, or pass a "
            "protocol that trains, --protocol coco-448 or voc12-to-voc07"
        )
    if protocol is None:
        return
    ignored, more = list(_FIXED), ""
    if protocol.classifier != "logistic":
        ignored += [*_FEATURE_OPTIONS, *(["cache"] if protocol.classifier == "sgd" else [])]
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
