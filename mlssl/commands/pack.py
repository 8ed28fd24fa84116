"""`mlssl pack`: a data set in a few large files."""

from __future__ import annotations

from pathlib import Path

from mlssl.data.set_options import SplitOptions, given_options, with_folder


def pack(
    root: str | list[str], options: SplitOptions, megabytes: int | None = None, output: Path = Path("shards")
) -> None:
    """Pack a data set in tar archives with an index, to be read from a disk or an object store.

    Example: mlssl pack datasets/coco --dataset coco -o coco-shards

    Args:
        root: Folder of the images, or several: '[a, b]'.
        options: Sets of images; the format is folder by default.
        megabytes: Size of an archive in MB (10⁶ bytes); 256 by default.
        output: Folder to create; an existing one is never changed.
    """
    from mlssl.data.datamodule import MultiLabelDataModule
    from mlssl.data.packing import ARCHIVE_MEGABYTES, check_target, pack_shards

    if options.dataset in ("synthetic", "shards"):
        raise ValueError(f"dataset={options.dataset!r} has no image files to pack: pass the format of {root!r}")
    megabytes = ARCHIVE_MEGABYTES if megabytes is None else megabytes
    check_target(output, megabytes)
    data = MultiLabelDataModule(**given_options(with_folder(options, root)))
    data.setup()
    assert data.train_records is not None
    sets = {"train": data.train_records} | ({} if data.val_records is None else {"val": data.val_records})
    pack_shards(sets, output, megabytes)
    images = " and ".join(f"{len(records)} {split}" for split, records in sets.items())
    sizes = [path.stat().st_size for path in output.glob("*/*.tar")]
    archives = f"{len(sizes)} {'archive' if len(sizes) == 1 else 'archives'}"
    print(f"{output}: {images} images in {archives}, {sum(sizes) / 1e6:.1f} MB")
    print(f"mlssl fit --data.dataset shards --data.root {output}")
