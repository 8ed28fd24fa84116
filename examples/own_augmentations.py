"""Custom augmentations: an albumentations pipeline for X-rays, from Python and from a YAML file.

python examples/own_augmentations.py --root xrays/

With the command: `mlssl fit --data.branches '[xray.yaml, xray.yaml]' --data.root xrays/`, and to see the views
`mlssl views xray.png --branches '[xray.yaml, xray.yaml]'`.
"""

import albumentations as A
import lightning as L
from jsonargparse import auto_cli

from mlssl import MultiLabelDataModule, MultiLabelSSLModule


def xray(size: int) -> A.Compose:
    """Views of a radiograph: no colour, no solarisation, a small turn, and the contrast that exposures differ by."""
    return A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=(0.3, 1.0)),
            A.Rotate(limit=10, p=0.5),
            A.CLAHE(clip_limit=(1, 3), p=0.5),
            A.RandomBrightnessContrast(0.2, 0.2, p=0.8),
            A.HorizontalFlip(p=0.5),
        ]
    )


def main(root: str | None = None, epochs: int = 5, size: int = 64, batch_size: int = 32) -> None:
    """Pre-train on views of a pipeline, given once as an object and once as the file that it is saved in.

    Args:
        root: Folder of radiographs; scenes are drawn where it is not given.
        epochs: Passes over the images.
        size: Side of a view in pixels.
        batch_size: Images per step.
    """
    A.save(xray(size), "xray.yaml", data_format="yaml")
    branches = [xray(size), "xray.yaml"]
    data = MultiLabelDataModule(
        "folder" if root else "synthetic", root, batch_size=batch_size, size=size, branches=branches
    )
    trainer = L.Trainer(max_epochs=epochs, logger=False)
    trainer.fit(MultiLabelSSLModule("resnet18", projection_dim=512), data)
    print(f"loss {trainer.callback_metrics['train/loss']:.3f} with views of {data.views.num_branches} branches")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
