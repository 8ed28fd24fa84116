"""MultiLabelSSLModule inside a Lightning project that has its own data, callbacks and optimizer.

`python examples/own_lightning_project.py`. The data here are random rectangles, so that the example needs no files: put
your own decoding into `Rectangles`.
"""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from mlssl import BlockViews, MultiLabelSSLModule
from mlssl.callbacks import CollapseMonitor


class Rectangles(Dataset):
    """Your images. A training item is the views of an image and its number; labels are optional."""

    def __init__(self, count: int, views: BlockViews) -> None:
        self.count = count
        self.views = views

    def __len__(self) -> int:
        return self.count

    def pixels(self, index: int) -> np.ndarray:
        generator = np.random.default_rng(index)
        image = np.full((96, 128, 3), generator.integers(0, 256, 3), np.uint8)
        for top, left in generator.integers(0, 64, (6, 2)):
            image[top : top + 32, left : left + 32] = generator.integers(0, 256, 3)
        return image

    def __getitem__(self, index: int) -> dict:
        return {"views": self.views(self.pixels(index)), "image_ids": index}


class OwnData(L.LightningDataModule):
    """Any datamodule does, as long as its training batches hold "views" and "image_ids"."""

    def __init__(self, count: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self.dataset = Rectangles(count, BlockViews(size=32, rows=2, cols=2, overlap=0.2))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def predict_dataloader(self) -> DataLoader:
        images = [torch.from_numpy(self.dataset.pixels(index)).permute(2, 0, 1) for index in range(len(self.dataset))]
        return DataLoader(images, batch_size=self.batch_size)


class OwnModule(MultiLabelSSLModule):
    """The method as it is, under an optimizer of one's own."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class PrintLoss(L.Callback):
    """A callback of one's own reads what the step returns."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            shape = tuple(outputs["features"].shape)
            print(f"epoch {trainer.current_epoch}: loss {outputs['loss'].item():.3f}, features {shape} (B, A, K, D)")


def main(count: int = 256, epochs: int = 2, out: Path = Path("own_project")):
    """Train, load the checkpoint, predict.

    Args:
        count: Images.
        epochs: Passes over them.
        out: Folder for everything that is written.
    """
    L.seed_everything(0)
    data = OwnData(count)
    model = OwnModule("resnet18", projection_dim=128, predictor_dim=64)
    saver = ModelCheckpoint(out, filename="own", enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        default_root_dir=out,
        logger=False,
        callbacks=[PrintLoss(), CollapseMonitor(), EMAWeightAveraging(decay=0.9), saver],
    )
    trainer.fit(model, data)

    loaded = OwnModule.load_from_checkpoint(saver.best_model_path, weights_only=True)
    features = torch.cat(trainer.predict(loaded, datamodule=data))
    print(f"{saver.best_model_path} gives features {tuple(features.shape)} of {count} images")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
