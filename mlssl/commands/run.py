"""`mlssl fit`, `validate`, `test` and `predict`: LightningCLI, with a folder of its own for every run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from safetensors.torch import save_file

from mlssl.atomic import written_aside
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import new_run_folder, run_settings

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_MORE = """
  --trainer.devices N          and every other argument of lightning.Trainer
  --config FILE                YAML with any of these, as --print_config prints them
  --print_config               print the settings and stop
  --help_all                   every argument of trainer, model and data, with its meaning"""

_OF_A_CHECKPOINT = (
    """
  --ckpt_path FILE             checkpoint of mlssl fit
  --data.dataset NAME          synthetic, coco, corel5k, folder
  --data.root FOLDER           its images
  --data.eval_size N           side that whole images are resized to"""
    + _MORE
)

TRAINER_HELP = {
    "fit": """usage: mlssl fit [OPTIONS]

Pre-train a backbone. Everything is written to a folder of the run's own, RUNS/NAME-<time>.

  --data.dataset NAME          synthetic (default), coco, corel5k, folder
  --data.root FOLDER           its images
  --data.batch_size N          images a step on one device (default: 64)
  --data.size N                side of a view in pixels (default: 224)
  --data.rows N --data.cols N  grid of blocks (default: 2 and 2)
  --data.overlap SHARE         of the image's side, 0 to 0.5 (default: 0.2)
  --model.backbone NAME        of timm, or torchvision/NAME (default: resnet50)
  --model.base_lr RATE         for 256 views a step (default: 0.05)
  --trainer.max_epochs N       passes over the images
  --trainer.logger CLASS       WandbLogger, TensorBoardLogger, ... beside metrics.csv
  --name NAME --runs FOLDER    of the run's folder
  --ckpt_path FILE             go on from a checkpoint"""
    + _MORE
    + """

Example: mlssl fit --data.dataset folder --data.root photos/ --trainer.max_epochs 100""",
    "validate": """usage: mlssl validate --ckpt_path FILE [OPTIONS]

Score the online probe of a checkpoint on the val set.
"""
    + _OF_A_CHECKPOINT
    + """

Example: mlssl validate --ckpt_path last.ckpt --data.dataset corel5k --data.root FOLDER""",
    "test": """usage: mlssl test --ckpt_path FILE [OPTIONS]

Score the online probe of a checkpoint on the test set.
"""
    + _OF_A_CHECKPOINT
    + """

Example: mlssl test --ckpt_path last.ckpt --data.dataset corel5k --data.root FOLDER""",
    "predict": """usage: mlssl predict --ckpt_path FILE [OPTIONS]

Write the features of every image to features.safetensors in the run's folder.
"""
    + _OF_A_CHECKPOINT
    + """

Example: mlssl predict --ckpt_path last.ckpt --data.dataset folder --data.root photos/""",
}
"""What `mlssl COMMAND --help` prints: the arguments that most runs need."""


class RunCLI(LightningCLI):
    """LightningCLI for :class:`MultiLabelSSLModule` whose every run has a folder of its own, see `mlssl.runs`.

    Args:
        words: Those after `mlssl`, the first being the command.

    Raises:
        KeyboardInterrupt: If the user interrupts; its text says where the run can go on from.
        jsonargparse.ArgumentError: On words that are no arguments.
    """

    def __init__(self, words: list[str]) -> None:
        self.folder: Path | None = None
        quiet = {"exit_on_error": False}  # a wrong word is an error like any other, not a page of usage
        try:
            super().__init__(
                MultiLabelSSLModule,
                MultiLabelDataModule,
                args=words,
                seed_everything_default=0,
                parser_kwargs={"prog": "mlssl", **quiet, **dict.fromkeys(TRAINER_COMMANDS, quiet)},
                auto_configure_optimizers=False,
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning ends the process by itself after Ctrl-C.
            trainer = getattr(self, "trainer", None)
            if isinstance(stop, SystemExit) and not (trainer is not None and trainer.interrupted):
                raise
            raise KeyboardInterrupt(self._where_it_stands()) from None
        finally:
            self._leave_no_empty_folder()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and parent of the run's folder, and one seed for weights and views."""
        parser.add_argument("--name", type=str, default=None, help="Of the run: its folder is RUNS/NAME-<time>.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given, without a look at the words of the process."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **settings: Any) -> Any:
        """The Trainer as the user set it, completed by `mlssl.runs.run_settings`."""
        name = self._get(self.config, "name") or str(self.subcommand)
        self.folder = new_run_folder(self._get(self.config, "runs"), name)
        given = {**self._get(self.config_init, "trainer", default={}), **settings}
        return super().instantiate_trainer(**run_settings(self.folder, given))

    def predict(self, **arguments: Any) -> None:
        """Write the features (n, D) and ids (n,) of every image to ``features.safetensors`` in the run's folder."""
        if self.trainer.world_size > 1:
            raise ValueError(
                f"predict writes one file, and {self.trainer.world_size} devices were asked for: "
                "pass --trainer.devices 1."
            )
        batches: Any = self.trainer.predict(**{**arguments, "return_predictions": True})
        features = torch.cat(batches)
        loader: Any = self.trainer.predict_dataloaders
        ids = torch.from_numpy(loader.dataset.records.image_ids[: len(features)])
        path = Path(self.trainer.default_root_dir) / "features.safetensors"
        with written_aside(path) as aside:
            save_file({"features": features, "image_ids": ids.contiguous()}, aside)
        print(f"{path}: features {tuple(features.shape)} of {len(ids)} images")

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments that the module was built with."""
        settings: dict[str, Any] = self._get(self.config, "model").as_dict()
        return settings

    def _where_it_stands(self) -> str:
        """Where an interrupted run can go on from, as a clause."""
        if self.folder is None or self.subcommand != "fit":
            return "nothing was written"
        last = self.folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            return f"the run in {self.folder} has no checkpoint yet"
        return (
            f"the last checkpoint is {last}, and this goes on from it: "
            f"mlssl fit --config {self.folder / 'config.yaml'} --ckpt_path {last}"
        )

    def _leave_no_empty_folder(self) -> None:
        """A run that failed before it wrote anything takes its folder along."""
        if self.folder is not None:
            with suppress(OSError):  # of a folder that is not empty
                self.folder.rmdir()
