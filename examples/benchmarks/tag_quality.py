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
from torchmetrics.functional.classification import multilabel_f1_score

from mlssl.commands.evaluation import features_of, labelled_sets, open_backbones, set_name, with_defaults
from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.parsing import call_function
from mlssl.evaluation.probe import linear_probe
from mlssl.tagging.fit import fit_tagger


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
    for name, model in open_backbones(sources, options.seed).items():
        found: dict[str, list[float]] = {}
        sets = features_of(name, model, data, options)
        labels = sets.test.labels.long()
        positives = (labels == 1).sum(0)
        how = {"num_labels": len(train.classes), "ignore_index": -1}
        for seed in range(options.seed, options.seed + seeds):
            strength = linear_probe(sets.train, sets.test, num_resamples=0, seed=seed).strength
            tagger = fit_tagger(
                model, sets.train, train.classes, size=data.eval_size, pooling=pooling, strength=strength, seed=seed
            )
            probabilities = tagger.network.calibration(tagger.network.logits(sets.test.features))
            for at, thresholds in (("chosen", tagger.thresholds.values), ("0.5", torch.tensor(0.5))):
                given = (probabilities > thresholds).float()
                f1 = multilabel_f1_score(given, labels, average="none", **how)
                found.setdefault(f"CF1 {at}", []).append(f1[positives > 0].mean().item())
                found.setdefault(f"OF1 {at}", []).append(
                    multilabel_f1_score(given, labels, average="micro", **how).item()
                )
                counts = zip(train.classes, positives.tolist(), f1.tolist(), strict=True)
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
