"""`mlssl neighbors`: the images, or blocks of images, that a backbone finds most similar to a query."""

from __future__ import annotations

from pathlib import Path

from mlssl.data.set_options import SetOptions, with_folder


def neighbors(
    image: Path,
    root: str | list[str],
    options: SetOptions,
    backbone: str = "resnet50",
    k: int = 9,
    embeddings: Path | None = None,
    block: int | None = None,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    size: int = 224,
    num_workers: int = 0,
    seed: int = 0,
    output: Path = Path("neighbors.png"),
) -> None:
    """Draw the images of a folder that a backbone finds most similar to an image, or to a block of it.

    Example: mlssl neighbors photo.jpg photos/ --backbone last.ckpt --block 0

    Args:
        image: Query image; left out of the results if it is in the folder.
        root: Folder to search, with its subfolders, or several: '[a, b]'.
        options: Set of images in it; the format is folder by default.
        backbone: Run, checkpoint, exported file, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME (untrained).
        k: Images to find.
        embeddings: File of mlssl predict for the folder and backbone, so that the folder is not embedded again.
        block: Index of a block of the image, from 0, to compare with all blocks of all images.
        rows: Rows of the block grid.
        cols: Columns of the block grid.
        overlap: Fraction of the image side by which blocks overlap, 0–0.5.
        size: Side in pixels to which images or blocks are resized.
        num_workers: Loader processes.
        seed: Seed of untrained weights.
        output: PNG to write; an existing one is replaced.
    """
    from mlssl.data.decoding import decode_rgb
    from mlssl.data.formats import read_train
    from mlssl.data.option_checks import check_options
    from mlssl.data.records import Records
    from mlssl.drawing.similar import draw_similar
    from mlssl.embeddings.files import read_embeddings
    from mlssl.embeddings.search import check_first_row, embedded_alike, nearest_rows
    from mlssl.evaluation.similar import Similar, find_similar, identical_files
    from mlssl.views.grid import Box, block_grid
    from mlssl.weights.sources import open_backbone

    if embeddings is not None and block is not None:
        raise ValueError(f"--block {block} compares blocks, but --embeddings is of whole images: leave one of them out")
    options = with_folder(options, root)
    check_options(options)
    pixels = decode_rgb(image, white=options.white)
    saved = None if embeddings is None else read_embeddings(embeddings)
    if saved is not None and not isinstance(options.root, str):
        raise ValueError(f"--embeddings is of one folder, but {options.root!r} was given: pass only that folder")
    records = read_train(options) if saved is None else Records(saved.names, root=str(options.root))
    model = open_backbone(backbone, seed=seed)
    own = next((index for index in range(len(records)) if records.path(index).resolve() == image.resolve()), None)
    if saved is not None and embeddings is not None:
        check_first_row(records.path(0), options.white, model, saved, embeddings, size)
        indices, cosines = nearest_rows(embedded_alike(pixels, model, saved, embeddings, size), saved.rows, k, own)
        similar = Similar(indices, [Box(0, 0, 0, 0)] * len(indices), cosines)
    else:
        similar = find_similar(
            model,
            pixels,
            records,
            k,
            block=block,
            rows=rows,
            cols=cols,
            overlap=overlap,
            size=size,
            leave_out=own,
            num_workers=num_workers,
            progress=True,
        )
    box = None if block is None else block_grid(pixels.shape[0], pixels.shape[1], rows, cols, overlap)[block]
    remarks = identical_files(image, records, similar.indices)
    draw_similar(pixels, box, records, similar, output, image.name, remarks)
    for index, cosine, remark in zip(similar.indices, similar.cosines, remarks, strict=True):
        print(f"{cosine:.3f}  {records.path(index)}{f'  ({remark})' if remark else ''}")
    if model.untrained:
        print(f"{backbone} is untrained: the images it finds share mostly colour")
    print(f"{output}: {image.name} and its {len(similar.indices)} most similar images of {len(records)}")
