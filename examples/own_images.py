"""Pre-train on your own images: a folder of photographs, or a manifest that also says what they show.

    python examples/own_images.py --folder photos/
    python examples/own_images.py --manifest photos/train.csv --val photos/val.csv

A manifest has one line an image, its path relative to the manifest and the names of its labels:

    path,labels,unknown
    kitchen/1.jpg,cup|table,
    street/2.jpg,car,person

Whether street/2.jpg shows a person is unknown; every other label that is not named is absent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.callbacks import BackboneExport, CollapseMonitor, OnlineLinearProbe, ViewGridLogger
from mlssl.data.readers.folder import read_folder
from mlssl.data.readers.manifest import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train on images of your own.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path)
    source.add_argument("--manifest", type=Path)
    parser.add_argument("--val", type=Path, help="manifest of other images, which the probe is scored on")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()

    if arguments.folder:
        train, val = read_folder(arguments.folder), None
    else:
        train = read_manifest(arguments.manifest)
        val = read_manifest(arguments.val, train.classes) if arguments.val else None
    print(train)

    data = MultiLabelDataModule(
        train=train,
        val=val,
        batch_size=arguments.batch_size,
        size=arguments.size,
        on_bad_image="skip",  # a broken file among thousands is named at the end
    )
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        default_root_dir="runs/own_images",
        callbacks=[OnlineLinearProbe(), CollapseMonitor(), ViewGridLogger(), BackboneExport()],
    )
    trainer.fit(MultiLabelSSLModule(arguments.backbone), data)
    print(f"look at {trainer.default_root_dir}/views, take the backbone from {trainer.default_root_dir}/exports")
    if "probe/mAP" in trainer.callback_metrics:
        print(f"mAP of the probe: {trainer.callback_metrics['probe/mAP']:.3f}")


if __name__ == "__main__":
    main()
