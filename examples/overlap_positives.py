"""Positives weighted by what two views share: the IoU of their boxes, by the library's function and by a custom one.

python examples/overlap_positives.py --root photos/
mlssl fit --model.positives 'by_overlap(1.0)' --data.dataset folder --data.root photos/
"""

import lightning as L
import torch
from jsonargparse import auto_cli

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.losses import by_overlap


def half_by_overlap(cosines, same_image, boxes, key_boxes):
    """Half a weight for every view of the same image, and up to one for those that show the same: (c, M)."""
    return 0.5 * same_image + 0.5 * by_overlap(1.0)(cosines, same_image, boxes, key_boxes)


def main(root: str | None = None, epochs: int = 5, size: int = 64, batch_size: int = 32) -> None:
    """Pre-train with each, and print how far the features spread.

    Args:
        root: Folder of photographs; scenes are drawn where it is not given.
        epochs: Passes over the images.
        size: Side of a view in pixels.
        batch_size: Images per step.
    """
    for positives in ("by_overlap(1.0)", half_by_overlap):
        data = MultiLabelDataModule("folder" if root else "synthetic", root, batch_size=batch_size, size=size)
        model = MultiLabelSSLModule("resnet18", projection_dim=512, positives=positives)
        trainer = L.Trainer(max_epochs=epochs, logger=False)
        trainer.fit(model, data)
        loss: torch.Tensor = trainer.callback_metrics["train/image_aware_loss"]
        print(f"image-aware loss {loss:.3f} with positives {model.hparams['positives']}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
