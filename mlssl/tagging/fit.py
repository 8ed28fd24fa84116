"""Fit a tagger on labelled features: the classifier on all images, calibration and thresholds on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlssl.atomic import check_free
from mlssl.choices import Pooling, PositiveWeight
from mlssl.evaluation.features import Features
from mlssl.evaluation.logistic import StandardisedRows, logistic_regression
from mlssl.tagging.tagger import LabelNetwork, Tagger
from mlssl.tagging.thresholds import NEVER, calibrate, check_precision, choose_thresholds
from mlssl.weights.sources import Backbone

if TYPE_CHECKING:
    from mlssl.evaluation.protocols import Protocol

FOLDS = 5
"""Number of parts of the training images; each is scored by a classifier fitted on the others."""

MIN_POSITIVES = 10
"""Thresholds of labels with fewer positives are reported as uncertain."""


def fit_tagger(
    model: Backbone,
    train: Features,
    classes: Sequence[str],
    *,
    size: tuple[int, int],
    pooling: Pooling,
    strength: float,
    precision: float | None = None,
    pos_weight: PositiveWeight = 1.0,
    seed: int = 0,
) -> Tagger:
    """A linear classifier on frozen features, with a calibration and a threshold for each label.

    Every training image is held out once: it is scored by a classifier fitted on the other four fifths.
    Calibration and thresholds are chosen on these scores; the classifier of the tagger is then fitted on all images.

    Args:
        model: Backbone of the features.
        train: Labelled features, at least two images.
        classes: L names.
        size: Height and width of the images of the features.
        pooling: Pooling of the features.
        strength: λ chosen by :func:`mlssl.linear_probe`.
        precision: Target precision of the predicted labels; None: the best F1 of each label.
        pos_weight: As for the probe.
        seed: Seed of the parts and of the thresholds' resamples.

    Raises:
        ValueError: If labels are missing, there are fewer than two images, or `precision` is out of range.
    """
    labels = train.labels
    if labels is None or len(labels) < 2:
        raise ValueError("a tagger needs at least two labelled training images: pass a labelled set")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out = held_out_logits(train, strength, pos_weight=pos_weight, seed=seed, device=device)
    standardised = StandardisedRows(train.features, device=device)
    solution = logistic_regression(standardised, labels, [strength], pos_weight=pos_weight)
    about = {
        "images": len(labels),
        "strength": strength,
        "pos_weight": pos_weight,
        "thresholds": "best F1" if precision is None else f"precision {precision:g}",
        "seed": seed,
    }
    # Samples nothing from the global random state.
    classifier = nn.utils.skip_init(nn.Linear, train.features.shape[1], labels.shape[1])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        classifier.weight.copy_(solution.weights[0].T)
        classifier.bias.copy_(solution.bias[0])
    return tagger_of(
        model,
        classifier,
        held_out,
        labels,
        classes,
        size=size,
        pooling=pooling,
        standardised_by=(solution.mean.cpu(), solution.scale.cpu()),
        precision=precision,
        seed=seed,
        about=about,
    )


def tagger_of(
    model: Backbone,
    classifier: nn.Linear,
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    size: tuple[int, int],
    pooling: Pooling = "avg",
    standardised_by: tuple[Tensor, Tensor] | None = None,
    precision: float | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Tagger:
    """A tagger from a backbone and its classifier, such as of a fine-tuned network, and logits of held-out images.

    Args:
        model: Backbone; it is frozen.
        classifier: From features (n, D) to logits (n, L); its weights are copied.
        logits: (n, L) of images that neither was trained on, before calibration.
        labels: (n, L) of these images, 1, 0 and −1 for unknown. A label without both a positive and a negative among
            them is never predicted.
        classes: L names.
        size: Height and width of the images.
        pooling: Pooling of the last feature map.
        standardised_by: Mean and scale (D,) by which the classifier's features are standardised; None: not at all.
        precision: As for :func:`fit_tagger`.
        seed: Seed of the thresholds' resamples.
        about: Further entries of the file.

    Raises:
        ValueError: If `precision` is out of range.
    """
    learned = (labels == 1).any(0) & (labels == 0).any(0)
    calibration = calibrate(logits[:, learned], labels[:, learned])
    thresholds = choose_thresholds(calibration(logits), labels, precision=precision, seed=seed)
    thresholds.values[~learned] = NEVER
    width = classifier.in_features
    mean, scale = standardised_by or (torch.zeros(width), torch.ones(width))
    network = LabelNetwork(
        model.frozen(),
        mean,
        scale,
        classifier.weight.detach().cpu(),
        classifier.bias.detach().cpu(),
        calibration,
        pooling,
    )
    return Tagger(network, classes, thresholds, size, about)


def check_saving(path: Path | None, precision: float | None, sources: Sequence[str], protocol: Protocol | None) -> None:
    """Refuse a tagger that cannot be fitted or saved, before an image is read.

    Raises:
        ValueError: If a precision is given without a path or is out of range, there are several backbones, or the
            protocol has another classifier.
        FileExistsError: If the path exists.
    """
    if path is None:
        if precision is not None:
            raise ValueError(
                f"precision={precision} was given, which only a tagger uses: pass --save tagger.safetensors too"
            )
        return
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors, the suffix of a tagger: rename it")
    if len(sources) > 1:
        raise ValueError(f"a tagger has one backbone, but {len(sources)} were given with --save: pass one of them")
    if protocol is not None and protocol.classifier != "logistic":
        raise ValueError(
            f"{protocol.name} does not fit a classifier that can be saved: leave out --save, or the protocol"
        )
    check_precision(precision)
    check_free(path)


def held_out_logits(
    train: Features, strength: float, *, pos_weight: PositiveWeight, seed: int, device: torch.device | None = None
) -> Tensor:
    """Logits (n, L) of every image by a classifier that was not trained on it.

    Args:
        train: Labelled features.
        strength: λ of the classifiers.
        pos_weight: Weight of positives.
        seed: Seed of the parts.
        device: Device to compute on.
    """
    labels = train.labels
    assert labels is not None
    count = len(labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    part = torch.empty(count, dtype=torch.int64)
    part[order] = torch.arange(count) % min(FOLDS, count)
    logits = torch.empty(labels.shape)
    for number in range(min(FOLDS, count)):
        fit, held_out = (part != number).nonzero()[:, 0], (part == number).nonzero()[:, 0]
        solution = logistic_regression(
            StandardisedRows(train.features, fit, device=device), labels[fit], [strength], pos_weight=pos_weight
        )
        logits[held_out] = solution.logits(train.features, held_out)[0]
    return logits


def certainty(tagger: Tagger) -> list[str]:
    """Sentences on the uncertainty of the thresholds, for users of the tagger."""
    thresholds, classes = tagger.thresholds, tagger.classes
    width = (thresholds.high - thresholds.low)[thresholds.values < NEVER]
    sentences = []
    if len(width):
        sentences.append(
            f"thresholds by {tagger.about.get('thresholds', 'unknown means')}, chosen on held-out parts of "
            f"{tagger.about.get('images', 'the')} training images; their 90 % intervals have "
            f"a median width of {width.median().item():.2f}, and at most {width.max().item():.2f}"
        )
    few = [
        name
        for name, value, positives in zip(classes, thresholds.values, thresholds.positives, strict=True)
        if value < NEVER and positives < MIN_POSITIVES
    ]
    if few:
        sentences.append(f"uncertain, with fewer than {MIN_POSITIVES} positive images: {_label_list(few)}")
    never = [name for name, value in zip(classes, thresholds.values, strict=True) if value >= NEVER]
    if never:
        sentences.append(f"never predicted, without positive or negative images or the precision: {_label_list(never)}")
    return sentences


def _label_list(names: Sequence[str]) -> str:
    return f"{len(names)} labels ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
