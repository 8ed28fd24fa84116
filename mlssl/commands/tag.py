"""`mlssl tag`: label every image of a folder or data set with a tagger of `mlssl linear --save`."""

from __future__ import annotations

from pathlib import Path

from mlssl.data.set_options import SetOptions, with_folder


def tag(
    tagger: Path,
    root: str | list[str],
    options: SetOptions,
    maps: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    devices: list[str] | None = None,
    overwrite: bool = False,
    output: Path = Path("tags.csv"),
) -> None:
    """Write path, labels and probabilities of every image of a folder or data set.

    Example: mlssl tag tagger.safetensors photos/ -o tags.csv

    Args:
        tagger: File of mlssl linear --save; nothing in it is run as code.
        root: Folder of the images, with its subfolders, or several: '[a, b]'.
        options: Set of images in it; the format is folder by default.
        maps: Folder for one picture per image that shows where its labels come from.
        batch_size: Images per step.
        num_workers: Loader processes.
        devices: Torch devices, such as '[cuda:0, cuda:1]'; by default the first GPU, else the CPU.
        overwrite: Replace existing files.
        output: File to write, .csv, .jsonl or .parquet.
    """
    from mlssl.atomic import check_free
    from mlssl.data.formats import read_train
    from mlssl.data.option_checks import check_options
    from mlssl.drawing.tag_maps import draw_tag_maps
    from mlssl.embeddings.streaming import Images, left_out, streamed
    from mlssl.tagging.fit import certainty
    from mlssl.tagging.tag_files import check_tag_file, tag_writer
    from mlssl.tagging.tagger import Tagger

    options = with_folder(options, root)
    check_options(options)
    loaded = Tagger.load(tagger)
    check_tag_file(output, loaded.classes)
    if not overwrite:
        check_free(output)
        if maps is not None:
            check_free(maps)
    images = Images(read_train(options), loaded.size, batch_size, num_workers)
    for sentence in certainty(loaded):
        print(sentence)
    count = 0
    with tag_writer(output, loaded.classes) as writer:
        for indices, probabilities in streamed(loaded.network, images, devices, total=len(images), progress=True):
            labels = loaded.labels(probabilities)
            writer.write([images.name(index) for index in indices], labels, probabilities.tolist())
            count += sum(map(len, labels))
            if maps is None:
                continue
            for index, row, names in zip(indices, probabilities, labels, strict=True):
                pixels = images.records.image(index)
                columns = [loaded.classes.index(name) for name in names]
                (of_all,) = loaded.maps([pixels])
                name = images.name(index)
                target = maps / f"{name}.png"
                draw_tag_maps(pixels, names, row[columns].tolist(), of_all[columns], target, Path(name).name)
        bad = images.bad()
    print(f"{output}: {count} labels of {len(images) - len(bad)} images, {len(loaded.classes)} classes")
    if bad:
        print(left_out(bad))
