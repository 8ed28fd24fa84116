"""`mlssl linear`: evaluate backbones by a linear probe on frozen features, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlssl.choices import PositiveWeight
from mlssl.commands.evaluation_options import EvaluationOptions


def linear(
    sources: list[str],
    options: EvaluationOptions,
    protocol: str | None = None,
    fractions: list[float] | None = None,
    pos_weight: PositiveWeight | None = None,
    threshold: float | None = None,
    epochs: int | None = None,
    save: Path | None = None,
    precision: float | None = None,
) -> None:
    """Compare backbones by a linear probe on frozen features, and by kNN.

    Example: mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME (untrained).
        options: Images and features.
        protocol: Published evaluation, which fixes data, sizes and classifier: coco-448, voc12-to-voc07, voc07-svm
            or corel5k.
        fractions: Fractions of the labels to train on as well: '[0.01, 0.1, 1.0]'.
        pos_weight: Weight of a positive, or balanced; 1 by default.
        threshold: Probability of a predicted label; 0.5 by default.
        epochs: Epochs, for a protocol that trains.
        save: Tagger to write, such as tagger.safetensors.
        precision: Precision of the tagger's labels; best F1 by default.
    """
    from mlssl.commands.evaluation import (
        features_of,
        finish,
        labelled_sets,
        open_backbones,
        print_images,
        print_missing_classes,
        set_name,
        with_defaults,
        with_run_size,
    )
    from mlssl.commands.protocol_options import options_of_protocol, refuse_ignored
    from mlssl.commands.scores import probe_result, sgd_result, svm_result
    from mlssl.evaluation.few_labels import check_fractions
    from mlssl.evaluation.logistic import check_pos_weight
    from mlssl.evaluation.metrics import THRESHOLD, MultiLabelScores
    from mlssl.evaluation.protocols import describe, find_protocol
    from mlssl.tagging.fit import certainty, check_saving, fit_tagger

    own = {"fractions": fractions, "pos_weight": pos_weight, "threshold": threshold, "epochs": epochs}
    chosen = None if protocol is None else find_protocol(protocol)
    refuse_ignored(chosen, {**vars(options), **own})
    check_saving(save, precision, sources, chosen)
    if chosen is not None:
        options, threshold = options_of_protocol(chosen, options), chosen.threshold
    threshold = THRESHOLD if threshold is None else threshold
    weight = 1.0 if pos_weight is None else pos_weight
    models = open_backbones(sources, options.seed)
    if chosen is None:
        options = with_run_size(options, list(models.values()))
    data, train, test = labelled_sets(options)
    # Refuse values out of range before reading an image.
    MultiLabelScores(threshold=threshold)
    check_pos_weight(weight)
    check_fractions(fractions or (), len(train))
    if chosen is not None:
        print(describe(chosen, train, test, epochs))
    else:
        print(
            f"{set_name(options)}: {len(train)} training and {len(test)} test images, {len(train.classes)} classes, "
            f"threshold {threshold:g}, no epochs: the regularisation strength is chosen on a fifth of the training "
            "images"
        )
    if chosen is None or chosen.classifier == "logistic":
        print_images(data, options)
    print_missing_classes(train, test)
    seed, num_workers = options.seed, data.image_dataloader("train").num_workers
    results = []
    for source, model in models.items():
        if chosen is None or chosen.classifier == "logistic":
            sets = features_of(source, model, data, options)
            settings: dict[str, Any] = {"pos_weight": weight, "threshold": threshold, "fractions": fractions or ()}
            results.append(probe_result(source, sets, **settings, seed=seed))
            if save is not None:
                strength = results[-1].numbers["strength"]
                kind = with_defaults(options).pooling
                how: dict[str, Any] = {"size": data.eval_size, "pooling": kind, "strength": strength}
                tagger = fit_tagger(
                    model, sets.train, train.classes, **how, precision=precision, pos_weight=weight, seed=seed
                )
                tagger.to("cpu").save(save)
                print(f"{save}: a tagger of {len(train.classes)} classes")
                print("\n".join(certainty(tagger)))
        elif chosen.classifier == "sgd":
            settings = {"epochs": epochs, "num_workers": num_workers, "seed": seed}
            results.append(sgd_result(source, model, chosen, train, test, **settings))
        else:
            settings = {"cache": options.cache, "num_workers": num_workers, "seed": seed}
            results.append(svm_result(source, model, chosen, train, test, **settings))
    finish("linear", results, train, test, options, {**own, "protocol": protocol, "threshold": threshold})
