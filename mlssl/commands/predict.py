"""`mlssl predict`: embeddings of every image of a folder or data set, with their names, in one file."""

from __future__ import annotations

from pathlib import Path

from mlssl.choices import Pooling
from mlssl.data.set_options import SetOptions, with_folder


def predict(
    source: str,
    root: str | list[str],
    options: SetOptions,
    size: int | tuple[int, int] = 224,
    pooling: Pooling = "avg",
    patches: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    devices: list[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    output: Path = Path("embeddings.safetensors"),
) -> None:
    """Write the features of every image, with the images' names.

    Example: mlssl predict last.ckpt photos/ -o embeddings.safetensors

    Args:
        source: Run, checkpoint, exported file, NAME=FILE, or NAME (untrained).
        root: Folder of the images, with its subfolders, or several: '[a, b]'.
        options: Set of images in it; the format is folder by default.
        size: Side, or height and width, to which images are resized.
        pooling: Pooling of the last feature map: avg, max, or avgmax (their mean).
        patches: Write the last feature map without pooling.
        batch_size: Images per step.
        num_workers: Loader processes.
        devices: Torch devices, such as '[cuda:0, cuda:1]'; by default the first GPU, else the CPU.
        seed: Seed of untrained weights.
        overwrite: Replace an existing file.
        output: File to write, .safetensors, .npy, .csv or .parquet.
    """
    import json

    from mlssl.atomic import check_free
    from mlssl.backbones import check_image_size
    from mlssl.data.formats import read_train
    from mlssl.data.option_checks import check_options
    from mlssl.embeddings.files import check_embedding_file, embedding_writer, names_file
    from mlssl.embeddings.networks import FeatureRows
    from mlssl.embeddings.streaming import Images, left_out, streamed
    from mlssl.weights.sources import open_backbone

    check_embedding_file(output, patches=patches)
    if not overwrite:
        check_free(output)
        if output.suffix == ".npy":
            check_free(names_file(output))
    if patches and pooling != "avg":
        raise ValueError(f"--pooling {pooling} was given, but --patches does not pool: leave one of them out")
    options = with_folder(options, root)
    check_options(options)
    sides = (size, size) if isinstance(size, int) else size
    model = open_backbone(source, seed=seed)
    check_image_size(model.backbone, *sides)
    images = Images(read_train(options), sides, batch_size, num_workers)
    about = {"source": source, "size": json.dumps(sides), "pooling": "patches" if patches else pooling}
    shape: tuple[int, ...] = ()
    with embedding_writer(output, about) as writer:
        for indices, rows in streamed(
            FeatureRows(model, pooling, patches=patches), images, devices, total=len(images), progress=True
        ):
            writer.write([images.name(index) for index in indices], rows)
            shape = tuple(rows.shape[1:])
        bad = images.bad()
    print(f"{output}: {len(images) - len(bad)} rows of {' × '.join(map(str, shape))} float32")
    if bad:
        print(left_out(bad))
