"""`mlssl knn`: how good backbones are by the labels of nearest images, in one table."""

from __future__ import annotations

from mlssl.commands.evaluation_options import EvaluationOptions


def knn(sources: list[str], options: EvaluationOptions, k: int | None = None, temperature: float | None = None) -> None:
    """Compare backbones by the labels of the nearest training images, without anything that learns.

    Example: mlssl knn last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG or NAME:pretrained for published weights, or
            NAME, which is then untrained.
        options: Of images and features.
        k: Nearest training images that vote; 20 by default.
        temperature: Of their weights exp(cosine / temperature); 0.07 by default.
    """
    from mlssl.commands.evaluation import (
        features_of,
        finish,
        labelled_sets,
        opened,
        print_images,
        print_missing,
        set_name,
        with_size_of_run,
    )
    from mlssl.commands.scores import found_by_neighbors
    from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE, check_temperature

    k, temperature = NUM_NEIGHBORS if k is None else k, TEMPERATURE if temperature is None else temperature
    models = opened(sources, options.seed)
    options = with_size_of_run(options, list(models.values()))
    data, train, test = labelled_sets(options)
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} neighbours were asked for, and there are {len(train)} training images: pass fewer")
    check_temperature(temperature)
    print(f"{set_name(options)}: {len(train)} voting and {len(test)} test images, {len(train.classes)} classes, k {k}")
    print_images(data, options)
    print_missing(train, test)
    found = []
    for source, model in models.items():
        sets = features_of(source, model, data, options)
        found.append(found_by_neighbors(source, sets, k=k, temperature=temperature, seed=options.seed))
    finish("knn", found, train, test, options, {"k": k, "temperature": temperature})
