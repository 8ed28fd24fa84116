"""Score frozen features for a row of the table that `mlssl linear` and `mlssl knn` print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from mlssl.choices import PositiveWeight
from mlssl.commands.results import FREQUENT, BackboneResult
from mlssl.contracts import FeatureNetwork
from mlssl.data.records import Records
from mlssl.evaluation.bootstrap import interval_of, resample
from mlssl.evaluation.classes import frequent_mean
from mlssl.evaluation.crops import Crops
from mlssl.evaluation.features import Features
from mlssl.evaluation.few_labels import few_labels_probe
from mlssl.evaluation.frozen import FrozenSets, frozen_sets
from mlssl.evaluation.metrics import average_precision, mean_average_precision, multilabel_scores
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE, knn_scores, label_jaccard, nearest_neighbors
from mlssl.evaluation.probe import linear_probe
from mlssl.evaluation.protocols import CropData, Protocol, ProtocolResult, evaluate_sgd, evaluate_svm


def probe_result(
    source: str,
    sets: FrozenSets,
    *,
    pos_weight: PositiveWeight,
    threshold: float,
    fractions: Sequence[float],
    seed: int,
) -> BackboneResult:
    """Scores of a logistic regression, of kNN, and of a logistic regression on fractions of the labels."""
    train, test = sets
    result = linear_probe(train, test, pos_weight=pos_weight, num_resamples=0, seed=seed, progress=True)
    assert test.labels is not None
    resampled = resample(result.scores, test.labels, seed=seed, progress=True)
    interval = interval_of(resampled.means, result.mAP)
    scores = multilabel_scores(result.scores.sigmoid(), test.labels, threshold=threshold)
    k = min(NUM_NEIGHBORS, len(train.features))
    votes, _ = mean_average_precision(_votes(train, test, k, TEMPERATURE), test.labels)
    columns = {
        "linear mAP": f"{result.mAP:.3f}",
        "95 % interval": _interval(interval),
        FREQUENT: _frequent(result.average_precision, test.labels),
        "strength": f"{result.strength:g}",
        f"kNN mAP (k {k})": f"{votes:.3f}",
        "OF1": f"{scores['OF1']:.3f}",
        "CF1": f"{scores['CF1']:.3f}",
    }
    numbers: dict[str, Any] = {
        **scores,
        "mAP": result.mAP,
        "interval": interval,
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
    return BackboneResult(source, columns, numbers, result.average_precision, resampled)


def knn_result(source: str, sets: FrozenSets, *, k: int, temperature: float, seed: int) -> BackboneResult:
    """Scores of kNN classification, and the label overlap of the k nearest training images."""
    bank, queries = sets
    assert bank.labels is not None
    assert queries.labels is not None
    scores = _votes(bank, queries, k, temperature)
    mean, classes = mean_average_precision(scores, queries.labels)
    resampled = resample(scores, queries.labels, seed=seed, progress=True)
    interval = interval_of(resampled.means, mean)
    by_class = average_precision(scores, queries.labels)
    nearest = nearest_neighbors(queries.features.float(), bank.features, k)
    jaccard = label_jaccard(queries.labels, bank.labels, nearest.indices)
    columns = {
        "kNN mAP": f"{mean:.3f}",
        "95 % interval": _interval(interval),
        FREQUENT: _frequent(by_class, queries.labels),
        "Jaccard@1": f"{jaccard[:, :1].nanmean():.3f}",
        f"Jaccard@{k}": f"{jaccard.nanmean():.3f}",
    }
    numbers = {
        "mAP": mean,
        "classes": classes,
        "interval": interval,
        "jaccard": [jaccard[:, : nearest_k + 1].nanmean().item() for nearest_k in range(k)],
    }
    return BackboneResult(source, columns, numbers, by_class, resampled)


def sgd_result(
    source: str,
    model: FeatureNetwork,
    protocol: Protocol,
    train: Records,
    test: Records,
    *,
    epochs: int | None,
    num_workers: int,
    seed: int,
) -> BackboneResult:
    """Scores of a protocol that trains its classifier under the Trainer."""
    trainer = L.Trainer(
        max_epochs=epochs or protocol.epochs,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    result = evaluate_sgd(protocol, model, CropData(protocol, train, test, num_workers, seed), trainer)
    return _protocol_result(source, result, seed)


def svm_result(
    source: str,
    model: FeatureNetwork,
    protocol: Protocol,
    train: Records,
    test: Records,
    *,
    num_workers: int,
    cache: str | None,
    seed: int,
) -> BackboneResult:
    """Scores of a protocol with a support vector machine on features of fixed crops."""
    loaders = (
        DataLoader(Crops(records, protocol.crop, protocol.test_resize), protocol.batch_size, num_workers=num_workers)
        for records in (train, test)
    )
    return _protocol_result(source, evaluate_svm(*frozen_sets(model, *loaders, cache=cache, name=source)), seed)


def _votes(bank: Features, queries: Features, k: int, temperature: float) -> Tensor:
    assert bank.labels is not None
    return knn_scores(queries.features.float(), bank.features, bank.labels, k, temperature=temperature)


def _protocol_result(source: str, result: ProtocolResult, seed: int) -> BackboneResult:
    resampled = resample(result.logits, result.targets, seed=seed, progress=True)
    interval = interval_of(resampled.means, result.scores["mAP"])
    columns = {name: f"{value:.3f}" for name, value in result.scores.items() if name != "classes"}
    columns = {
        "mAP": columns.pop("mAP"),
        "95 % interval": _interval(interval),
        FREQUENT: _frequent(result.average_precision, result.targets),
        **columns,
    }
    return BackboneResult(source, columns, {**result.scores, "interval": interval}, result.average_precision, resampled)


def _frequent(by_class: Tensor, targets: Tensor) -> str:
    mean = frequent_mean(by_class, (targets == 1).sum(0))
    return "none" if math.isnan(mean) else f"{mean:.3f}"


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
