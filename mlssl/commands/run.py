"""`mlssl fit`, `validate`, `test` and `predict`: LightningCLI, with a folder of its own for every run."""

from __future__ import annotations

import difflib
import json
import re
from argparse import ArgumentError, ArgumentParser
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from safetensors.torch import save_file

from mlssl.atomic import written_aside
from mlssl.commands.interrupts import Interrupts
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.module import MultiLabelSSLModule
from mlssl.run_folder import resumable_run
from mlssl.runs import logger_in_folder, new_run_folder, run_settings, run_summary
from mlssl.weights.checkpoints import load_plain

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_MORE = """
  --trainer.devices N          and every other argument of lightning.Trainer
  --config FILE                YAML with any of these, as --print_config prints them
  --print_config               print the settings and stop
  --help_all                   every argument of trainer, model and data, with its meaning"""

_OF_A_CHECKPOINT = (
    """
  --ckpt_path FILE             checkpoint of mlssl fit
  --data.dataset NAME          synthetic, coco, voc, corel5k, manifest, folder, shards
  --data.root FOLDER           its images
  --data.eval_size N           side that whole images are resized to"""
    + _MORE
)

TRAINER_HELP = {
    "fit": """usage: mlssl fit [OPTIONS]

Pre-train a backbone. Everything is written to a folder of the run's own, RUNS/NAME-<time>.

  --data.dataset NAME          synthetic (default), coco, voc, corel5k, manifest, folder, shards
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
  --resume RUN                 go on where a run stopped, in its own folder
  --start_from CHECKPOINT      begin a new run with the weights of another one"""
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
        ValueError: On words that are no arguments, and where Weights & Biases does not take the run.
    """

    def __init__(self, words: list[str]) -> None:
        self.folder: Path | None = None
        self.resumed: Path | None = None
        """Checkpoint that the run of the folder goes on from."""
        self._interrupts = Interrupts()
        with self._interrupts:
            self._run(words)

    def _run(self, words: list[str]) -> None:
        try:
            super().__init__(
                MultiLabelSSLModule,
                MultiLabelDataModule,
                save_config_callback=_SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                args=self._translated(words),
                seed_everything_default=0,
                parser_kwargs={"prog": "mlssl"},
                auto_configure_optimizers=False,
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning ends the process by itself after Ctrl-C.
            trainer = getattr(self, "trainer", None)
            if isinstance(stop, SystemExit) and not (trainer is not None and trainer.interrupted):
                raise
            raise KeyboardInterrupt(self._where_it_stands()) from None
        except ArgumentError as error:  # of hyper-parameters that a checkpoint brings
            raise ValueError(" ".join(str(error).split())) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "wandb":
                raise
            raise ValueError(
                f"Weights & Biases does not take the run ({' '.join(str(error).split())}): log in with `wandb login`, "
                "or pass --trainer.logger.offline true and send it later with `wandb sync`."
            ) from error
        finally:
            self._end_wandb()
            self._leave_no_empty_folder()

    def _translated(self, words: list[str]) -> list[str]:
        """The words that LightningCLI understands: those of a resumed run, and --check-images in full."""
        words = ["--data.check_images=true" if word == "--check-images" else word for word in words]
        parser = ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
        parser.add_argument("--resume", metavar="RUN")
        try:
            given, others = parser.parse_known_args(words)
        except ArgumentError:
            raise ValueError("--resume was given alone: pass the folder of a run, --resume runs/NAME-<time>.") from None
        if given.resume is None:
            return words
        if others[0] != "fit":
            raise ValueError(f"--resume is for fit, and {others[0]} was asked for: pass --ckpt_path CHECKPOINT.")
        if any(word.partition("=")[0] == "--start_from" for word in others):
            raise ValueError("--start_from begins a new run, and --resume goes on with one: give one of them.")
        self.folder = Path(given.resume)
        config, self.resumed = resumable_run(self.folder)
        return ["fit", "--config", str(config), *others[1:]]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and parent of the run's folder, and one seed for weights and views."""
        parser.add_argument("--name", type=str, default=None, help="Of the run: its folder is RUNS/NAME-<time>.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--resume",
            type=str,
            default=None,
            help="Folder of a run that goes on in it, with its config; what else is given, such as more epochs, holds.",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="fit: Checkpoint whose weights a new run starts from, with a schedule of its own and any data.",
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given, without a look at the words of the process, and offer what was meant instead."""
        parsers = {"mlssl": parser, **self._subcommand_parsers}
        for one in parsers.values():
            one.exit_on_error, one.allow_abbrev = False, False
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            command = next((str(word) for word in args or () if word in self._subcommand_parsers), "mlssl")
            raise ValueError(_said_plainly(str(error), parsers[command])) from error
        self._asked = self.config[self.config.subcommand].model.clone()

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another architecture than was asked for: its own would silently be taken."""
        defaults = self._parser(self.subcommand).get_defaults()["model"]
        for name in ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim"):
            asked, taken = self._asked[name], self._get(self.config, "model")[name]
            if asked not in (taken, defaults[name]):
                raise ValueError(
                    f"The checkpoint is of another architecture, {name}={taken!r}, and {asked!r} was asked for: leave "
                    "the setting out, or the checkpoint."
                )

    def instantiate_trainer(self, **settings: Any) -> Any:
        """The Trainer as the user set it, completed by `mlssl.runs.run_settings`."""
        if self.resumed is None:
            name = self._get(self.config, "name") or str(self.subcommand)
            self.folder = new_run_folder(self._get(self.config, "runs"), name)
        else:  # not in self.config, which is saved: the run itself did not begin with its own checkpoint
            self.config_init[self.subcommand]["ckpt_path"] = str(self.resumed)
        assert self.folder is not None
        given = {**self._get(self.config_init, "trainer", default={}), **settings}
        given["logger"] = self._loggers_in_folder(self.folder, given.get("logger"))
        trainer: Any = super().instantiate_trainer(**run_settings(self.folder, given, checkpoint=self.resumed))
        trainer.callbacks.insert(0, self._interrupts)
        return trainer

    def _loggers_in_folder(self, folder: Path, loggers: Any) -> Any:
        configs = self._get(self.config, "trainer").logger
        if isinstance(loggers, list):
            return [
                logger_in_folder(one, _arguments(config), folder) for one, config in zip(loggers, configs, strict=True)
            ]
        return logger_in_folder(loggers, _arguments(configs), folder) if isinstance(loggers, Logger) else loggers

    def after_fit(self) -> None:
        """Write the run's summary to ``summary.json``, and to the loggers that take one."""
        if not self.trainer.is_global_zero or self._get(self.config, "trainer").fast_dev_run:
            return
        assert self.folder is not None
        summary = run_summary(self.folder, self.trainer)
        with written_aside(self.folder / "summary.json") as aside:
            aside.write_text(json.dumps(summary, indent=2) + "\n")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(summary)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("summary", _as_code(json.dumps(summary, indent=2)))
                logger.finalize("success")  # once more, for what was written after the Trainer did

    def before_fit(self) -> None:
        """Weights of another run's checkpoint, heads included; optimizer, schedule and epochs start afresh.

        Raises:
            ValueError: If the run is to be resumed too, or the weights are those of another model.
        """
        source = self._get(self.config, "start_from")
        if source is None or self.resumed is not None:  # a resumed run has long begun
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
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
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
        ids = torch.tensor(loader.dataset.image_ids()[: len(features)])
        path = Path(self.trainer.default_root_dir) / "features.safetensors"
        with written_aside(path) as aside:
            save_file({"features": features, "image_ids": ids}, aside)
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
        return f"the last checkpoint is {last}, and this goes on from it: mlssl fit --resume {self.folder}"

    def _end_wandb(self) -> None:
        """Close the run in Weights & Biases that this one began; its last values are written then."""
        trainer = getattr(self, "trainer", None)
        if trainer is not None and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            if wandb.run is not None:
                wandb.finish(exit_code=int(trainer.interrupted or not trainer.state.finished))

    def _leave_no_empty_folder(self) -> None:
        """A run that failed before it wrote anything takes its folder along."""
        if self.folder is not None and self.resumed is None:
            with suppress(OSError):  # of a folder that is not empty
                self.folder.rmdir()


class _SaveConfig(SaveConfigCallback):
    """Writes the config of a run to its folder, and to the loggers that take one."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Write config.yaml; of a run that goes on under other settings, the former stay as config-before-<n>.yaml."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        before = path.read_text() if path.exists() else None
        text = self.parser.dump(self.config, skip_none=False)
        if before not in (None, text):
            number = 1 + sum(1 for _ in path.parent.glob("config-before-*.yaml"))
            path.rename(path.with_name(f"config-before-{number}.yaml"))
        with written_aside(path) as aside:
            aside.write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                settings = self.config.as_dict()
                logger.log_hyperparams({name: settings[name] for name in ("trainer", "seed_everything")})
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", _as_code(text))


def _arguments(config: Any) -> dict[str, Any]:
    """Of a class, as the parser keeps it."""
    init_args, others = config.get("init_args"), config.get("dict_kwargs")
    return {**(init_args.as_dict() if init_args else {}), **(dict(others) if others else {})}


def _as_code(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _said_plainly(message: str, parser: LightningArgumentParser) -> str:
    """One line; where a setting is misspelt, the nearest one there is."""
    known = sorted(set(re.findall(r"--([\w.]+)", parser.format_help())))
    named = re.search(r"(?:option|key|argument)s?:? [\"']?-{0,2}([A-Za-z_][\w.]*)", message, re.IGNORECASE)
    if named is None or named[1] in known:
        return " ".join(message.split())
    near = difflib.get_close_matches(named[1], known, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ":"
    return f"there is no setting {named[1]!r}{meant} `mlssl {parser.prog.split()[-1]} --help_all` lists them"
