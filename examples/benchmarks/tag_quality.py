"""Quality of tags on the test images: F1 of each class at the tagger's thresholds, against a threshold of 0.5.

python examples/benchmarks/tag_quality.py resnet18 last.ckpt --dataset corel5k --root FOLDER

For each seed, `mlssl linear --save` is repeated: the classifier is fitted on the features of the training images,
thresholds are chosen on held-out parts of them. A seed splits the images; the network stays the same. The test images
are used only for the scores. CF1 is the mean of the classes' F1 here, over classes with a positive test
image; OF1 is the F1 of all labels together.
"""

import csv
import sys
from pathlib import Path

import torch
from torch import Tensor

from mlssl.commands.evaluation import features_of, labelled_sets, open_backbones, set_name, with_defaults
from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.parsing import call_function
from mlssl.evaluation.probe import linear_probe
from mlssl.tagging.fit import fit_tagger


def f1_of_classes(given: Tensor, labels: Tensor) -> Tensor:
    """F1 (L,) of each class; NaN without a positive. Labels are 1, 0, and −1 for unknown, which do not count."""
    given = given & (labels >= 0)
    right = (given & (labels == 1)).sum(0)
    return torch.where((labels == 1).any(0), 2 * right / (given.sum(0) + (labels == 1).sum(0)), torch.nan)


def f1_of_all(given: Tensor, labels: Tensor) -> float:
    """F1 of all labels together."""
    return f1_of_classes(given.reshape(-1, 1), labels.reshape(-1, 1)).item()


def tag_quality(
    sources: list[str],
    options: EvaluationOptions,
    seeds: int = 3,
    out: Path | None = None,
) -> None:
    """Compare the F1 of tags at the chosen thresholds and at 0.5, on the test images.

    Example: python examples/benchmarks/tag_quality.py resnet18 last.ckpt --dataset corel5k --root FOLDER

    Args:
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME (untrained).
        options: Of images; seed is the first one.
        seeds: Number of seeds.
        out: CSV file for the F1 of each class.
    """
    data, train, test = labelled_sets(options)
    pooling = with_defaults(options).pooling
    assert pooling is not None
    rows, of_classes = [], []
    for source in sources:
        found: dict[str, list[float]] = {}
        for seed in range(options.seed, options.seed + seeds):
            ((name, model),) = open_backbones([source], seed).items()
            sets = features_of(name, model, data, options)
            labels = sets.test.labels
            strength = linear_probe(sets.train, sets.test, num_resamples=0, seed=seed).strength
            tagger = fit_tagger(
                model, sets.train, train.classes, size=data.eval_size, pooling=pooling, strength=strength, seed=seed
            )
            probabilities = tagger.network.calibration(tagger.network.logits(sets.test.features))
            for at, thresholds in (("chosen", tagger.thresholds.values), ("0.5", torch.tensor(0.5))):
                given = probabilities > thresholds
                f1 = f1_of_classes(given, labels)
                found.setdefault(f"CF1 {at}", []).append(f1.nanmean().item())
                found.setdefault(f"OF1 {at}", []).append(f1_of_all(given, labels))
                counts = zip(train.classes, (labels == 1).sum(0).tolist(), f1.tolist(), strict=True)
                of_classes += [[name, seed, at, *one] for one in counts]
        pairs = [f"{torch.tensor(values).mean():.3f} ± {torch.tensor(values).std():.3f}" for values in found.values()]
        rows.append([name, *pairs])
    height, width = data.eval_size
    print(f"{set_name(options)}: {len(test)} test images, {len(train.classes)} classes, {height} × {width} pixels\n")
    print(
        f"| network, {seeds} seeds | CF1, chosen thresholds | OF1, chosen thresholds | CF1, 0.5 | OF1, 0.5 |",
        "|---" * 5 + "|",
        sep="\n",
    )
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows([["network", "seed", "threshold", "class", "test images", "F1"], *of_classes])


if __name__ == "__main__":
    call_function(tag_quality, sys.argv[1:], "tag_quality.py")
