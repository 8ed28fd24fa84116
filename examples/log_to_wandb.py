"""Watch a pre-training in Weights & Biases: losses, probe, collapse figures and pictures of the views.

    python examples/log_to_wandb.py                # log in first: wandb login
    python examples/log_to_wandb.py --offline      # without an account; send it later with wandb sync

The command does the same: mlssl fit --trainer.logger WandbLogger --trainer.logger.project my-project
"""

from __future__ import annotations

import argparse

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.callbacks import CollapseMonitor, OnlineLinearProbe, Throughput, ViewGridLogger


def main() -> None:
    parser = argparse.ArgumentParser(description="Log a pre-training on drawn scenes to Weights & Biases.")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--project", default="mlssl")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="at most, in an epoch")
    arguments = parser.parse_args()

    logger = WandbLogger(project=arguments.project, save_dir="runs", offline=arguments.offline)
    data = MultiLabelDataModule(batch_size=16, size=32, eval_size=64)
    model = MultiLabelSSLModule("resnet10t", projection_dim=256, predictor_dim=64)
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        limit_train_batches=arguments.steps,
        log_every_n_steps=5,
        logger=logger,
        default_root_dir="runs",
        callbacks=[OnlineLinearProbe(), CollapseMonitor(), ViewGridLogger(), Throughput()],
    )
    trainer.fit(model, data)
    logger.experiment.summary["images"] = len(data.train_records)
    print(f"the run: {logger.experiment.url or logger.experiment.dir}")
    logger.experiment.finish()


if __name__ == "__main__":
    main()
