"""Shared by `mlssl linear` and `mlssl knn`: read both sets, extract features, print and write the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.results import BackboneResult, differences, print_positives, print_table, write_results
from mlssl.contracts import FeatureNetwork
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.records import Records
from mlssl.data.set_options import as_list, given_options
from mlssl.evaluation.classes import class_counts
from mlssl.evaluation.frozen import EVAL_SIZE, POOLING, FrozenSets, frozen_sets
from mlssl.weights.sources import Backbone, open_backbone


class LabelledSets(NamedTuple):
    """Both sets of an evaluation, and the data module that read them."""

    data: MultiLabelDataModule
    train: Records
    test: Records


def open_backbones(sources: Sequence[str], seed: int) -> dict[str, Backbone]:
    """Backbones by their name in the table; the name marks random weights.

    Raises:
        FileNotFoundError: See `open_backbone`.
        ValueError: See `open_backbone`; also if a source is given twice.
    """
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice: pass each backbone once")
    models = [open_backbone(source, seed=seed) for source in sources]
    return {
        f"{source} (untrained)" if model.untrained else source: model
        for source, model in zip(sources, models, strict=True)
    }


def with_run_size(options: EvaluationOptions, models: Sequence[Backbone]) -> EvaluationOptions:
    """The options, with the whole-image size of the first backbone that records one, unless a size was given."""
    if options.eval_size is not None:
        return options
    for model in models:
        data = json.loads(model.history.get("data", "{}"))
        size = data.get("eval_size") or data.get("size")
        if size:
            return replace(options, eval_size=size if isinstance(size, int) else tuple(size))
    return options


def with_defaults(options: EvaluationOptions) -> EvaluationOptions:
    """The options, with defaults for those that were not given."""
    is_drawn = options.dataset is None and options.annotations is None
    return replace(
        options,
        dataset="synthetic" if is_drawn else options.dataset,
        eval_size=EVAL_SIZE if options.eval_size is None else options.eval_size,
        pooling=options.pooling or POOLING,
        batch_size=64 if options.batch_size is None else options.batch_size,
    )


def set_name(options: EvaluationOptions) -> str:
    """Name of the data set: its format, or its annotation files."""
    return ", ".join(as_list(options.annotations)) or str(with_defaults(options).dataset)


def labelled_sets(options: EvaluationOptions) -> LabelledSets:
    """Read both sets.

    Raises:
        ValueError: If one of them is missing or has no labels, and as `MultiLabelDataModule`.
        FileNotFoundError: If a file is missing.
    """
    options = with_defaults(options)
    assert options.batch_size is not None
    data = MultiLabelDataModule(
        **given_options(options),
        batch_size=options.batch_size,
        eval_size=options.eval_size,
        num_workers=options.num_workers,
    )
    data.setup()
    train, test = data.train_records, data.val_records
    if train is None or test is None or train.labels is None or test.labels is None:
        raise ValueError(
            "an evaluation needs labelled training and test images: pass a data set that has both, or --val_fraction "
            "0.2 to hold some out"
        )
    return LabelledSets(data, train, test)


def features_of(
    source: str, model: FeatureNetwork, data: MultiLabelDataModule, options: EvaluationOptions
) -> FrozenSets:
    """Features of the whole images of both sets."""
    pooling = with_defaults(options).pooling
    assert pooling is not None
    loaders = data.image_dataloader("train"), data.image_dataloader("val")
    return frozen_sets(model, *loaders, pooling=pooling, cache=options.cache, name=source)


def print_missing_classes(train: Records, test: Records) -> None:
    """Print the classes without a positive in a set."""
    for name, records, what in (
        ("test", test, "left out of the mean"),
        ("training", train, "not learned; all images get the same score for it"),
    ):
        assert records.labels is not None
        missing = [
            key
            for key, has_positive in zip(records.classes, (records.labels == 1).any(0), strict=True)
            if not has_positive
        ]
        if missing:
            names = f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
            print(f"no positive in the {name} images for {len(missing)} classes ({names}): {what}")


def print_images(data: MultiLabelDataModule, options: EvaluationOptions) -> None:
    """Print the image size and the pooling."""
    height, width = data.eval_size
    print(f"whole images of {height} × {width} pixels, pooling {with_defaults(options).pooling}")


def finish(
    name: str,
    results: Sequence[BackboneResult],
    train: Records,
    test: Records,
    options: EvaluationOptions,
    own: Mapping[str, Any],
) -> None:
    """Print the table, and write it with all settings to a new folder."""
    counts = class_counts(train, test)
    between = differences(results)
    print_table(results)
    print_table(between, "difference")
    print_positives(counts)
    settings = {"sources": [one.source for one in results], **own, **asdict(with_defaults(options))}
    given = {key: value for key, value in settings.items() if value is not None}
    folder = write_results(options.runs, name, results, between, counts, given)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
