"""`mlssl knn`: evaluate backbones by kNN classification, in one table."""

from __future__ import annotations

from mlssl.commands.evaluation_options import EvaluationOptions


def knn(sources: list[str], options: EvaluationOptions, k: int | None = None, temperature: float | None = None) -> None:
    """Compare backbones by kNN classification; nothing is trained.

    Example: mlssl knn last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG or NAME:pretrained for published weights, or
            NAME (untrained).
        options: Images and features.
        k: Nearest training images that vote; 20 by default.
        temperature: Temperature of the votes' weights exp(cosine / temperature); 0.07 by default.
    """
    from mlssl.commands.evaluation import (
        features_of,
        finish,
        labelled_sets,
        open_backbones,
        print_images,
        print_missing_classes,
        set_name,
        with_run_size,
    )
    from mlssl.commands.scores import knn_result
    from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE, check_temperature

    k, temperature = NUM_NEIGHBORS if k is None else k, TEMPERATURE if temperature is None else temperature
    models = open_backbones(sources, options.seed)
    options = with_run_size(options, list(models.values()))
    data, train, test = labelled_sets(options)
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} was given, but there are {len(train)} training images: pass a smaller k")
    check_temperature(temperature)
    print(f"{set_name(options)}: {len(train)} voting and {len(test)} test images, {len(train.classes)} classes, k {k}")
    print_images(data, options)
    print_missing_classes(train, test)
    results = []
    for source, model in models.items():
        sets = features_of(source, model, data, options)
        results.append(knn_result(source, sets, k=k, temperature=temperature, seed=options.seed))
    finish("knn", results, train, test, options, {"k": k, "temperature": temperature})
