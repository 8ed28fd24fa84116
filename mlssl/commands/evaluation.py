"""What `mlssl linear` and `mlssl knn` do alike: read both sets, take features, print and write what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.results import Found, print_table, write_results
from mlssl.contracts import FeatureNetwork
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.records import Records
from mlssl.data.set_options import as_list, given_options
from mlssl.evaluation.frozen import FrozenSets, frozen_sets


class LabelledSets(NamedTuple):
    """Both sets of an evaluation, and the data module that read them."""

    data: MultiLabelDataModule
    train: Records
    test: Records


def completed(options: EvaluationOptions) -> EvaluationOptions:
    """The options with defaults for those that were not given."""
    is_drawn = options.dataset is None and options.annotations is None
    return replace(
        options,
        dataset="synthetic" if is_drawn else options.dataset,
        eval_size=224 if options.eval_size is None else options.eval_size,
        pooling=options.pooling or "avgmax",
        batch_size=64 if options.batch_size is None else options.batch_size,
    )


def set_name(options: EvaluationOptions) -> str:
    """What the images are called: their format, or the files of annotations."""
    return ", ".join(as_list(options.annotations)) or str(completed(options).dataset)


def labelled_sets(options: EvaluationOptions) -> LabelledSets:
    """Read both sets.

    Raises:
        ValueError: If one of them is missing or has no labels, and as `MultiLabelDataModule`.
        FileNotFoundError: If a file is missing.
    """
    options = completed(options)
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
    pooling = completed(options).pooling
    assert pooling is not None
    loaders = data.image_dataloader("train"), data.image_dataloader("val")
    return frozen_sets(model, *loaders, pooling=pooling, cache=options.cache, name=source)


def print_missing(train: Records, test: Records) -> None:
    """Name the classes that a set has no positive of."""
    for name, records, what in (
        ("test", test, "left out of the mean"),
        ("training", train, "not learned, and all images get one score for it"),
    ):
        assert records.labels is not None
        without = [key for key, there in zip(records.classes, (records.labels == 1).any(0), strict=True) if not there]
        if without:
            names = f"{', '.join(without[:5])}{', …' if len(without) > 5 else ''}"
            print(f"no positive among the {name} images for {len(without)} classes ({names}): {what}")


def finish(
    name: str, found: Sequence[Found], classes: Sequence[str], options: EvaluationOptions, own: Mapping[str, Any]
) -> None:
    """Print the table and write it to a folder of its own, with the settings that were in effect."""
    print_table(found)
    settings = {"sources": [one.source for one in found], **own, **asdict(completed(options))}
    given = {key: value for key, value in settings.items() if value is not None}
    folder = write_results(options.runs, name, found, classes, given)
    print(f"{folder}: results.json, table.csv, classes.csv, average_precision.png")
