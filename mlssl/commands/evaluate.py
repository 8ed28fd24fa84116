"""`mlssl linear` and `mlssl knn`: how good backbones are, in one table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from mlssl.backbones import Pooling
from mlssl.commands.results import Found, print_table, write_results
from mlssl.contracts import FeatureNetwork
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.formats import DatasetName
from mlssl.data.records import Records
from mlssl.evaluation.crops import Crops
from mlssl.evaluation.features import Features, extract_features
from mlssl.evaluation.few_labels import check_fractions, few_labels_probe
from mlssl.evaluation.logistic import PositiveWeight, check_pos_weight
from mlssl.evaluation.metrics import (
    THRESHOLD,
    MultiLabelScores,
    average_precision,
    bootstrap_interval,
    mean_average_precision,
    multilabel_scores,
)
from mlssl.evaluation.neighbors import (
    NUM_NEIGHBORS,
    TEMPERATURE,
    check_temperature,
    knn_scores,
    label_jaccard,
    nearest_neighbors,
)
from mlssl.evaluation.probe import LinearProbeResult, linear_probe
from mlssl.evaluation.protocols import (
    CropData,
    Protocol,
    ProtocolResult,
    describe,
    evaluate_sgd,
    evaluate_svm,
    find_protocol,
)
from mlssl.weights.sources import Backbone, open_backbone


def linear(
    sources: list[str],
    dataset: DatasetName = "synthetic",
    root: str | None = None,
    protocol: str | None = None,
    fractions: list[float] | None = None,
    eval_size: int | tuple[int, int] = 224,
    min_images_per_class: tuple[int, int] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    pooling: Pooling = "avgmax",
    pos_weight: PositiveWeight = 1.0,
    threshold: float = THRESHOLD,
    batch_size: int = 64,
    num_workers: int | None = None,
    epochs: int | None = None,
    cache: str | None = None,
    runs: str = "runs",
    seed: int = 0,
) -> None:
    """Compare backbones by a linear probe on their frozen features of whole images, with kNN beside it.

    Example: mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Checkpoints of `mlssl fit`, exported files, names of backbones, which are then untrained, or NAME=FILE.
        dataset: Format of `root`.
        root: Folder that holds the images.
        protocol: A published evaluation, which fixes data set, splits, sizes and classifier: coco-448, voc12-to-voc07,
            voc07-svm or corel5k.
        fractions: Shares of the labels to learn from besides, such as '[0.01, 0.1, 1.0]'.
        eval_size: Height and width, or one side, that whole images are resized to.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        train_split: Split to learn from; the format's training split by default.
        val_split: Split to test on; the format's val or test split by default.
        pooling: Over the last feature map: avg, max or their mean.
        pos_weight: Weight of a positive beside a negative's 1, or balanced.
        threshold: Probability from which a label counts as predicted.
        batch_size: Images a step.
        num_workers: Loader processes.
        epochs: Other than those of a protocol that trains, which it then no longer is.
        cache: Folder to keep features in, so that a pass that was stopped goes on and one that is done is not repeated.
        runs: Folder in which the results get one of their own.
        seed: Of untrained weights, of the split that chooses the regularisation, of subsets and of the bootstrap.
    """
    settings = {name: value for name, value in locals().items() if value is not None}
    chosen = None if protocol is None else find_protocol(protocol)
    if chosen is not None:
        _check_free(chosen, dataset, train_split, val_split, eval_size, min_images_per_class, threshold)
        dataset, train_split, val_split = cast(Any, chosen.dataset), chosen.train_split, chosen.test_split
        eval_size, min_images_per_class = chosen.eval_size or 224, chosen.min_images_per_class
        threshold = chosen.threshold
    data = _data(dataset, root, eval_size, min_images_per_class, train_split, val_split, batch_size, num_workers)
    train, test = _both(data)
    # What is out of range is refused before an image is read.
    MultiLabelScores(threshold=threshold)
    check_pos_weight(pos_weight)
    check_fractions(fractions or (), len(train))
    models = [(source, open_backbone(source, seed=seed)) for source in sources]
    if chosen is not None:
        print(describe(chosen, train, test, epochs if chosen.classifier == "sgd" else None))
    else:
        print(
            f"{dataset}: {len(train)} training and {len(test)} test images, {len(train.classes)} classes, "
            f"threshold {threshold:g}, no epochs: the strength is chosen on a fifth of the training images"
        )
    _say_missing(train, test)
    found = []
    for source, model in models:
        if chosen is not None and chosen.classifier != "logistic":
            found.append(_of_protocol(source, model, chosen, data, epochs, seed, cache))
            continue
        sets = _features(source, model, data, pooling, cache)
        found.append(_of_probe(source, *sets, pos_weight, threshold, fractions, seed))
    _finish(found, train.classes, runs, "linear", settings)


def knn(
    sources: list[str],
    dataset: DatasetName = "synthetic",
    root: str | None = None,
    k: int = NUM_NEIGHBORS,
    temperature: float = TEMPERATURE,
    eval_size: int | tuple[int, int] = 224,
    min_images_per_class: tuple[int, int] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    pooling: Pooling = "avgmax",
    batch_size: int = 64,
    num_workers: int | None = None,
    cache: str | None = None,
    runs: str = "runs",
    seed: int = 0,
) -> None:
    """Compare backbones by the labels of the nearest training images, without anything that learns.

    Example: mlssl knn last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Checkpoints of `mlssl fit`, exported files, names of backbones, which are then untrained, or NAME=FILE.
        dataset: Format of `root`.
        root: Folder that holds the images.
        k: Nearest training images that vote.
        temperature: Of their weights exp(cosine / temperature).
        eval_size: Height and width, or one side, that whole images are resized to.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        train_split: Split that votes; the format's training split by default.
        val_split: Split to test on; the format's val or test split by default.
        pooling: Over the last feature map: avg, max or their mean.
        batch_size: Images a step.
        num_workers: Loader processes.
        cache: Folder to keep features in, so that a pass that was stopped goes on and one that is done is not repeated.
        runs: Folder in which the results get one of their own.
        seed: Of untrained weights and of the bootstrap.
    """
    settings = {name: value for name, value in locals().items() if value is not None}
    data = _data(dataset, root, eval_size, min_images_per_class, train_split, val_split, batch_size, num_workers)
    train, test = _both(data)
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} neighbours were asked for, and there are {len(train)} training images: pass fewer")
    check_temperature(temperature)
    models = [(source, open_backbone(source, seed=seed)) for source in sources]
    print(f"{dataset}: {len(train)} voting and {len(test)} test images, {len(train.classes)} classes, k {k}")
    _say_missing(train, test)
    found = []
    for source, model in models:
        bank, queries = _features(source, model, data, pooling, cache)
        found.append(_of_neighbors(source, bank, queries, k, temperature, seed))
    _finish(found, train.classes, runs, "knn", settings)


def probe(model: FeatureNetwork, data: MultiLabelDataModule, pooling: Pooling, seed: int = 0) -> LinearProbeResult:
    """Linear probe on the frozen features of the whole images of a data module."""
    train, test = (
        extract_features(model, data.image_dataloader(split), pooling=pooling, progress=True)
        for split in ("train", "val")
    )
    return linear_probe(train, test, seed=seed, num_resamples=0)


def _data(
    dataset: DatasetName,
    root: str | None,
    eval_size: int | tuple[int, int],
    min_images_per_class: tuple[int, int] | None,
    train_split: str | None,
    val_split: str | None,
    batch_size: int,
    num_workers: int | None,
) -> MultiLabelDataModule:
    data = MultiLabelDataModule(
        dataset,
        root,
        batch_size=batch_size,
        eval_size=eval_size,
        num_workers=num_workers,
        train_split=train_split,
        val_split=val_split,
        min_images_per_class=min_images_per_class,
    )
    data.setup()
    return data


def _both(data: MultiLabelDataModule) -> tuple[Records, Records]:
    train, test = data.train_records, data.val_records
    if train is None or test is None or train.labels is None or test.labels is None:
        raise ValueError("an evaluation needs labelled training and test images: pass a data set that has both")
    return train, test


def _check_free(protocol: Protocol, dataset: str, *given: object) -> None:
    if dataset not in ("synthetic", protocol.dataset) or given != (None, None, 224, None, THRESHOLD):
        raise ValueError(
            f"{protocol.name} fixes data set, splits, sizes, classes and threshold: leave these out, or it"
        )


def _say_missing(train: Records, test: Records) -> None:
    for name, records, what in (
        ("test", test, "left out of the mean"),
        ("training", train, "not learned, and all images get one score for it"),
    ):
        assert records.labels is not None
        without = [key for key, there in zip(records.classes, (records.labels == 1).any(0), strict=True) if not there]
        if without:
            names = f"{', '.join(without[:5])}{', …' if len(without) > 5 else ''}"
            print(f"no positive among the {name} images for {len(without)} classes ({names}): {what}")


def _features(
    source: str, model: Backbone, data: MultiLabelDataModule, pooling: Pooling, cache: str | None
) -> tuple[Features, Features]:
    _to_gpu(model)
    train, test = (
        extract_features(
            model, data.image_dataloader(split), pooling=pooling, cache=_folder(cache, source, split), progress=True
        )
        for split in ("train", "val")
    )
    return train, test


def _to_gpu(model: nn.Module) -> None:
    if torch.cuda.is_available():
        model.to("cuda")


def _folder(cache: str | None, source: str, split: str) -> Path | None:
    return None if cache is None else Path(cache) / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', source)}-{split}"


def _of_probe(
    source: str,
    train: Features,
    test: Features,
    pos_weight: PositiveWeight,
    threshold: float,
    fractions: list[float] | None,
    seed: int,
) -> Found:
    result = linear_probe(train, test, pos_weight=pos_weight, seed=seed)
    assert test.labels is not None
    scores = multilabel_scores(result.scores.sigmoid(), test.labels, threshold=threshold)
    k = min(NUM_NEIGHBORS, len(train.features))
    votes, _ = mean_average_precision(_votes(train, test, k, TEMPERATURE), test.labels)
    columns = {
        "linear mAP": f"{result.mAP:.3f}",
        "95 % interval": _interval(result.interval),
        "strength": f"{result.strength:g}",
        f"kNN mAP (k {k})": f"{votes:.3f}",
        "OF1": f"{scores['OF1']:.3f}",
        "CF1": f"{scores['CF1']:.3f}",
    }
    numbers: dict[str, Any] = {
        **scores,
        "interval": result.interval,
        "strength": result.strength,
        "validation": result.validation,
        "knn_mAP": votes,
        "num_learned": result.num_learned,
    }
    if fractions:
        numbers["few_labels"] = []
        for few in few_labels_probe(train, test, fractions, pos_weight=pos_weight, seed=seed):
            spread = "" if len(few.mAPs) == 1 else f" ± {few.spread:.3f}"
            seen = sum(few.classes_seen) / len(few.classes_seen)
            columns[f"{100 * few.fraction:g} % of labels"] = f"{few.mean:.3f}{spread} ({seen:.0f} classes seen)"
            numbers["few_labels"].append({**vars(few), "mean": few.mean, "spread": few.spread})
    return Found(source, columns, numbers, result.average_precision)


def _of_neighbors(source: str, bank: Features, queries: Features, k: int, temperature: float, seed: int) -> Found:
    assert bank.labels is not None
    assert queries.labels is not None
    scores = _votes(bank, queries, k, temperature)
    mean, classes = mean_average_precision(scores, queries.labels)
    interval = bootstrap_interval(scores, queries.labels, seed=seed)
    nearest = nearest_neighbors(queries.features.float(), bank.features, k)
    jaccard = label_jaccard(queries.labels, bank.labels, nearest.indices)
    columns = {
        "kNN mAP": f"{mean:.3f}",
        "95 % interval": _interval(interval),
        "Jaccard@1": f"{jaccard[:, :1].nanmean():.3f}",
        f"Jaccard@{k}": f"{jaccard.nanmean():.3f}",
    }
    numbers = {
        "mAP": mean,
        "classes": classes,
        "interval": interval,
        "jaccard": [jaccard[:, : place + 1].nanmean().item() for place in range(k)],
    }
    return Found(source, columns, numbers, average_precision(scores, queries.labels))


def _votes(bank: Features, queries: Features, k: int, temperature: float) -> Tensor:
    assert bank.labels is not None
    return knn_scores(queries.features.float(), bank.features, bank.labels, k, temperature=temperature)


def _of_protocol(
    source: str,
    model: Backbone,
    protocol: Protocol,
    data: MultiLabelDataModule,
    epochs: int | None,
    seed: int,
    cache: str | None,
) -> Found:
    train, test = _both(data)
    workers = data.image_dataloader("train").num_workers
    if protocol.classifier == "sgd":
        trainer = L.Trainer(
            max_epochs=epochs or protocol.epochs,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        result = evaluate_sgd(protocol, model, CropData(protocol, train, test, workers, seed), trainer)
    else:
        _to_gpu(model)
        learned, tested = (
            extract_features(
                model,
                torch.utils.data.DataLoader(
                    Crops(records, protocol.crop, protocol.test_resize), protocol.batch_size, num_workers=workers
                ),
                pooling="avgmax",
                cache=_folder(cache, source, split),
                progress=True,
            )
            for split, records in (("train", train), ("val", test))
        )
        result = evaluate_svm(learned, tested)
    return _found(source, result, seed)


def _found(source: str, result: ProtocolResult, seed: int) -> Found:
    interval = bootstrap_interval(result.logits, result.targets, seed=seed)
    columns = {name: f"{value:.3f}" for name, value in result.scores.items() if name != "classes"}
    columns = {"mAP": columns.pop("mAP"), "95 % interval": _interval(interval), **columns}
    return Found(source, columns, {**result.scores, "interval": interval}, result.average_precision)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"


def _finish(found: list[Found], classes: tuple[str, ...], runs: str, name: str, settings: dict[str, Any]) -> None:
    print_table(found)
    folder = write_results(runs, name, found, classes, settings)
    print(f"{folder}: results.json, table.csv, classes.csv, average_precision.png")
