"""Linear probe on a fraction of the labels: label efficiency of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlssl.choices import PositiveWeight
from mlssl.evaluation.features import Features
from mlssl.evaluation.probe import STRENGTHS, check_sets, linear_probe, num_learnable

FRACTIONS = (0.01, 0.1, 1.0)

MIN_FRACTION_TO_CHOOSE = 0.1
"""Fraction of the training images below which none are held out to choose the strength."""

FIXED_STRENGTH = 0.1
"""λ if it is not chosen. Determined beforehand on Corel-5K's training images with an untrained ResNet-18: for 45, 90
and 180 labelled images the best of eight values from 0.001 to 10 on 900 others (mean of three subsets)."""


@dataclass(frozen=True)
class FewLabelsResult:
    """Linear probes on one fraction of the labels.

    Attributes:
        fraction: Fraction of the training images, above 0 and at most 1.
        num_images: Their number.
        mAPs: Mean average precision on the test set, 0–1, of each subset; classes never seen are included.
        classes_seen: Labels with a positive and a negative in each subset.
        strengths: λ of each probe.
    """

    fraction: float
    num_images: int
    mAPs: tuple[float, ...]  # noqa: N815 - the field's spelling
    classes_seen: tuple[int, ...]
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the mAPs."""
        return sum(self.mAPs) / len(self.mAPs)

    @property
    def spread(self) -> float:
        """Standard deviation of the mAPs over subsets; NaN for a single one."""
        return torch.tensor(self.mAPs, dtype=torch.float64).std().item() if len(self.mAPs) > 1 else float("nan")


def few_labels_probe(
    train: Features,
    test: Features,
    fractions: Sequence[float] = FRACTIONS,
    *,
    num_subsets: int = 5,
    pos_weight: PositiveWeight = 1.0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[FewLabelsResult]:
    """`linear_probe` on fixed random subsets of the training images, tested on the whole test set.

    Subset i of a seed is the same for every backbone, and smaller subsets are contained in larger ones. For at least a
    tenth of the images the strength is chosen as in `linear_probe`, on images of the subset; below that it is fixed
    (`FIXED_STRENGTH`), because a fifth of a few images is too few to choose it. All images are probed once, not
    `num_subsets` times.

    Args:
        train: Labelled features.
        test: Labelled features of the same widths.
        fractions: Fractions of the training images, each above 0 and at most 1.
        num_subsets: Number of subsets of each fraction below 1, at least 1.
        pos_weight: As for `linear_probe`.
        seed: Seed of the subsets.
        device: As for `linear_probe`.

    Raises:
        ValueError: If a fraction is out of range or gives fewer than two images, and as `linear_probe`.
    """
    labels, _ = check_sets(train, test)
    if num_subsets < 1:
        raise ValueError(f"num_subsets={num_subsets} was given: pass at least 1")
    check_fractions(fractions, len(labels))
    orders = [
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + subset))
        for subset in range(num_subsets)
    ]
    results = []
    for fraction in fractions:
        count = round(fraction * len(labels))
        probes, seen = [], []
        for order in orders if fraction < 1 else orders[:1]:
            rows = order[:count].sort().values
            part = train if fraction == 1 else Features(train.features[rows], labels[rows], train.image_ids[rows])
            strengths = STRENGTHS if fraction >= MIN_FRACTION_TO_CHOOSE else (FIXED_STRENGTH,)
            probes.append(
                linear_probe(
                    part, test, strengths=strengths, pos_weight=pos_weight, num_resamples=0, seed=seed, device=device
                )
            )
            seen.append(num_learnable(labels[rows]))
        results.append(
            FewLabelsResult(
                fraction,
                count,
                tuple(probe.mAP for probe in probes),
                tuple(seen),
                tuple(probe.strength for probe in probes),
            )
        )
    return results


def check_fractions(fractions: Sequence[float], num_images: int) -> None:
    """Refuse fractions of the training images that are too small or out of range.

    Raises:
        ValueError: If one is not in 0–1, or gives fewer than two images.
    """
    for fraction in fractions:
        if not 0 < fraction <= 1 or round(fraction * num_images) < 2:
            raise ValueError(
                f"fraction {fraction} of {num_images} training images was given: pass one in 0–1 of two or more"
            )
