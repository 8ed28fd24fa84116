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
from mlssl.export.sources import load_plain
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import new_run_folder, run_settings

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


class RunCLI(LightningCLI):
    """LightningCLI for :class:`MultiLabelSSLModule` whose every run has a folder of its own, see `mlssl.runs`.

    Args:
        words: Those after `mlssl`, the first being the command.
    """

    def __init__(self, words: list[str]) -> None:
        self.folder: Path | None = None
        try:
            super().__init__(
                MultiLabelSSLModule,
                MultiLabelDataModule,
                args=words,
                seed_everything_default=0,
                parser_kwargs={"prog": "mlssl"},
                auto_configure_optimizers=False,
            )
        finally:
            self._leave_no_empty_folder()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and parent of the run's folder, and one seed for weights and views."""
        parser.add_argument("--name", type=str, default=None, help="Of the run: its folder is RUNS/NAME-<time>.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="fit: Checkpoint whose weights a new run starts from, with a schedule of its own and any data.",
        )
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

    def before_fit(self) -> None:
        """Weights of another run's checkpoint, heads included; optimizer, schedule and epochs start afresh.

        Raises:
            ValueError: If the run is to be resumed too, or the weights are those of another model.
        """
        source = self._get(self.config, "start_from")
        if source is None:
            return
        if self._get(self.config, "ckpt_path"):
            raise ValueError(
                "--start_from begins a new run with a checkpoint's weights, and --ckpt_path goes on with its run: "
                "give one of them."
            )
        checkpoint = load_plain(Path(source))
        try:
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{source} does not fit the model, give --model.backbone and the widths that it was trained with: "
                f"{error}"
            ) from None

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

    def _leave_no_empty_folder(self) -> None:
        """A run that failed before it wrote anything takes its folder along."""
        if self.folder is not None:
            with suppress(OSError):  # of a folder that is not empty
                self.folder.rmdir()
