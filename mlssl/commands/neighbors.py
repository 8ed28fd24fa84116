"""`mlssl neighbors`: the images, or blocks of images, that a backbone finds most like one."""

from __future__ import annotations

from pathlib import Path


def neighbors(
    image: Path,
    folder: Path,
    backbone: str = "resnet50",
    k: int = 9,
    block: int | None = None,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    size: int = 224,
    num_workers: int = 0,
    seed: int = 0,
    output: Path = Path("neighbors.png"),
) -> None:
    """Draw the images of a folder that a backbone finds most like an image, or like a block of it.

    Example: mlssl neighbors photo.jpg photos/ --backbone last.ckpt --block 0

    Args:
        image: File to compare with; left out where it lies in the folder itself.
        folder: Searched, however deep.
        backbone: Run, checkpoint, exported file, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME, which is untrained.
        k: Images to find.
        block: Number of a block of the image, from 0, to compare with all blocks of all images.
        rows: Rows of the block grid.
        cols: Columns of the block grid.
        overlap: Share of the image side by which blocks overlap, 0–0.5.
        size: Side in pixels that images or blocks are resized to.
        num_workers: Loader processes.
        seed: Of untrained weights.
        output: PNG to write; an existing one is replaced.
    """
    from mlssl.data.decoding import decode_rgb
    from mlssl.data.readers.folder import read_folder
    from mlssl.drawing.similar import draw_similar
    from mlssl.evaluation.similar import find_similar, identical_files
    from mlssl.views.grid import block_grid
    from mlssl.weights.sources import open_backbone

    pixels, records = decode_rgb(image), read_folder(folder)
    model = open_backbone(backbone, seed=seed)
    own = next((line for line in range(len(records)) if records.path(line).resolve() == image.resolve()), None)
    found = find_similar(
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
    remarks = identical_files(image, records, found.lines)
    draw_similar(pixels, box, records, found, output, image.name, remarks)
    for line, cosine, remark in zip(found.lines, found.cosines, remarks, strict=True):
        print(f"{cosine:.3f}  {records.path(line)}{f'  ({remark})' if remark else ''}")
    if model.untrained:
        print(f"{backbone} is untrained: what it finds alike is mostly colour")
    print(f"{output}: {image.name} and the {len(found.lines)} most like it of {len(records)} images")
