"""`mlssl tag`: the labels of every image of a folder or data set, by a tagger of `mlssl linear --save`."""

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
        root: Folder that holds the images, however deep, or several: '[a, b]'.
        options: Of the set of images in it, the format is folder by default.
        maps: Folder for a picture of each photograph that shows where its labels come from.
        batch_size: Images per step.
        num_workers: Loader processes.
        devices: Of torch, such as '[cuda:0, cuda:1]'; by default the first GPU, else the CPU.
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
    found = Tagger.load(tagger)
    check_tag_file(output, found.classes)
    if not overwrite:
        check_free(output)
        if maps is not None:
            check_free(maps)
    images = Images(read_train(options), found.size, batch_size, num_workers)
    for sentence in certainty(found):
        print(sentence)
    count = 0
    with tag_writer(output, found.classes) as writer:
        for places, probabilities in streamed(found.network, images, devices, total=len(images), progress=True):
            labels = found.labels(probabilities)
            writer.write([images.name(place) for place in places], labels, probabilities.tolist())
            count += sum(map(len, labels))
            if maps is None:
                continue
            for place, row, names in zip(places, probabilities, labels, strict=True):
                pixels = images.records.image(place)
                columns = [found.classes.index(name) for name in names]
                (of_all,) = found.maps([pixels])
                name = images.name(place)
                target = maps / f"{name}.png"
                draw_tag_maps(pixels, names, row[columns].tolist(), of_all[columns], target, Path(name).name)
        bad = images.bad()
    print(f"{output}: {count} labels of {len(images) - len(bad)} images, {len(found.classes)} classes")
    if bad:
        print(left_out(bad))
