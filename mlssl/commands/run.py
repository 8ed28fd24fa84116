"""`mlssl fit`, `validate` and `test`: LightningCLI, with a folder of its own for every run."""

from __future__ import annotations

import json
import re
import shutil
import time
from argparse import ArgumentError
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from mlssl.atomic import remove_leftovers, written_aside
from mlssl.callbacks import RunRecord, StepMemory
from mlssl.commands.argument_errors import said_plainly
from mlssl.commands.begins_with import said_of_weights, take_checkpoints_of_runs, take_published_weights
from mlssl.commands.custom_code import imported, is_import_path, make_importable
from mlssl.commands.end_of_fit import describe_end
from mlssl.commands.failures import said_of_failure
from mlssl.commands.hyper_parameters import is_custom, plain_hyper_parameters
from mlssl.commands.interrupts import Interrupts
from mlssl.commands.lightning_private import OpenCLI
from mlssl.commands.other_processes import OtherProcesses
from mlssl.commands.run_words import read_words, words_of_callbacks
from mlssl.commands.saved_config import SaveConfig, arguments_of, as_code
from mlssl.commands.trainer_checks import check_monitored, check_trainer
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.locks import locked
from mlssl.out_of_memory import is_out_of_memory
from mlssl.received import check_downloads_nothing
from mlssl.runs import is_first_process, logger_in_folder, new_run_folder, run_settings, run_summary, steps_of
from mlssl.weights.checkpoints import check_content, check_resumable, load_plain, take_weights

FUNCTIONS = ("form", "positives")
"""Arguments of the module that are a name of the library's, or the import path of a user's function."""

_ARCHITECTURE = ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim")


class RunCLI(OpenCLI):
    """LightningCLI for :class:`MultiLabelSSLModule` or a custom class, with a folder for every run, see `mlssl.runs`.

    Args:
        words: Those after `mlssl`, the first being the command.
        model: Class to build; None: the one that the words or a config name, else `MultiLabelSSLModule`.
        data: Likewise, `MultiLabelDataModule`.

    Raises:
        KeyboardInterrupt: If the user interrupts; its text says how to resume the run.
        ValueError: On words that are not arguments, and if Weights & Biases does not accept the run.
    """

    def __init__(
        self,
        words: list[str],
        model: type[L.LightningModule] | None = None,
        data: type[L.LightningDataModule] | None = None,
    ) -> None:
        self.folder: Path | None = None
        self.resumed: Path | None = None
        """Checkpoint that the run of the folder resumes from."""
        self._words = words
        self._functions: dict[str, Any] = {}
        self._lock = ExitStack()
        self._began, self._steps_before = 0.0, 0
        self._interrupts = Interrupts()
        self._others = OtherProcesses()
        with self._interrupts:
            self._run(words, model, data)

    def _run(
        self, words: list[str], model: type[L.LightningModule] | None, data: type[L.LightningDataModule] | None
    ) -> None:
        make_importable()
        try:
            read = read_words(words, model, data)
            self.folder, self.resumed, self._recipe_callbacks = read.folder, read.checkpoint, read.callbacks
            self._model_kind = read.model
            if self.folder is not None:
                self._have_alone(self.folder)
            super().__init__(
                read.model,
                read.data,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                args=read.words,
                seed_everything_default=0,
                parser_kwargs={"prog": "mlssl"},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # it makes a checkpoint name code to import
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning ends the process by itself after Ctrl-C.
            trainer = getattr(self, "trainer", None)
            if isinstance(stop, SystemExit) and not (trainer is not None and trainer.interrupted):
                raise
            raise KeyboardInterrupt(self._where_it_stands()) from None
        except Exception as error:
            gone = self._others.who_is_gone(error)
            if gone is not None:
                raise ChildProcessError(gone) from error
            path = self.resumed or (self.settings.get("ckpt_path") if "config" in vars(self) else None)
            said = self._what_fits(error) or said_of_failure(error, path)
            if said is None:
                raise
            raise ValueError(said) from error
        finally:
            self._end_wandb()
            self._lock.close()
            self._leave_no_failed_start()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name and parent of the run's folder, what it is made of, and one seed for weights and views."""
        parser.add_argument("--name", type=str, default=None, help="Of the run: its folder is RUNS/NAME-<time>.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--resume",
            type=str,
            default=None,
            help="Folder of a run that goes on in it, with its config; what else is given, such as more epochs, holds. "
            "The classes and functions that its config.yaml names are imported: resume only runs that you trust.",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="fit: Checkpoint whose weights a new run starts from, with a schedule of its own and any data.",
        )
        parser.add_argument(
            "--recipe",
            type=str | None,
            default=None,
            help="Recipe, or its YAML file, for what neither --config nor another option gives.",
        )
        parser.add_argument("--model_class", type=str | None, default=None, help="Import path that --model gave.")
        parser.add_argument("--data_class", type=str | None, default=None, help="Import path that --data gave.")
        if "data.seed" in parser.get_defaults():
            parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given, without a look at the words of the process, and offer what was meant instead."""
        assert isinstance(args, list)
        for one in (parser, *self.command_parsers.values()):
            one.exit_on_error, one.allow_abbrev = False, False
        try:
            if self._recipe_callbacks:
                self.config = parser.parse_args([word for word in args if not word.startswith("--print_config")])
                args = [*args, *words_of_callbacks(self._recipe_callbacks, self.settings.trainer.callbacks)]
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            known = re.findall(r"--([\w.]+)", self.command_parsers[args[0]].format_help())
            raise ValueError(said_plainly(str(error), args[0], known)) from error
        take_checkpoints_of_runs(self.settings)
        asked = self.settings.model
        self._functions = {
            name: imported(asked[name], f"--model.{name}") for name in FUNCTIONS if is_import_path(asked.get(name))
        }

    def read_checkpoint(self) -> None:
        """Take the module's arguments from the checkpoint, where the user gave none.

        Raises:
            ValueError: If it is of another architecture than was asked for, of a function that was not given again, or
                names code to import.
        """
        path = self.resumed or self.settings.get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        content = load_plain(Path(path))
        if self.config.subcommand == "fit":
            check_resumable(content, Path(path))
        if self.resumed is not None:  # whose settings are in its config
            return
        check_content(content, Path(path))
        there = content.get("hyper_parameters") or {}
        asked, defaults = self.settings.model, self.command_parser.get_defaults()["model"]
        taken = {}
        for name, value in plain_hyper_parameters(there, self._model_kind, str(path)).items():
            if name not in defaults:
                continue
            if asked[name] == defaults[name]:
                taken[name] = value
            elif name in _ARCHITECTURE and asked[name] != value:
                raise ValueError(
                    f"The checkpoint is of another architecture, {name}={value!r}, and {asked[name]!r} was asked for: "
                    "leave the setting out, or the checkpoint."
                )
        check_downloads_nothing(taken, path)
        for name in FUNCTIONS:
            is_default = asked.get(name) == defaults.get(name)
            if self.config.subcommand == "fit" and is_custom(there.get(name)) and is_default:
                raise ValueError(
                    f"The checkpoint was trained with {name}={there[name]!r}, a function that it does not hold: "
                    f"pass it again, --model.{name} {there[name].split()[-1]}."
                )
        self.config = self.parser.parse_object({self.config.subcommand: {"model": taken}}, self.config)

    def instantiate_classes(self) -> None:
        """Build data, module and Trainer; the config that is saved keeps functions as text."""
        weights = None if self.resumed else take_published_weights(self.settings)
        config = self.config.clone()
        for name, function in self._functions.items():
            config[self.subcommand].model[name] = function
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except ValueError as error:
            if "Does not validate" not in str(error):  # but of a class itself
                raise
            raise ValueError(said_plainly(str(error), str(self.subcommand), ())) from error
        except Exception as error:
            said = said_of_weights(weights, error)
            if said is None:
                raise
            raise ValueError(said) from None
        self.datamodule, self.model = self.built("data"), self.built("model")
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **settings: Any) -> Any:
        """The Trainer as the user set it, completed by `mlssl.runs.run_settings`."""
        given = {**self.built("trainer", default={}), **settings}
        check_trainer(given)
        if self.resumed is None:
            name = self.settings.name or str(self.subcommand)
            self.folder = new_run_folder(self.settings.runs, name)
            self._have_alone(self.folder)
        else:  # not in self.config, which is saved: the run itself did not begin with its own checkpoint
            self.config_init[self.subcommand]["ckpt_path"] = str(self.resumed)
        assert self.folder is not None
        given["logger"] = self._loggers_in_folder(self.folder, given.get("logger"))
        trainer: Any = super().instantiate_trainer(**run_settings(self.folder, given, checkpoint=self.resumed))
        trainer.callbacks[:0] = [self._others, self._interrupts]
        for one in trainer.callbacks:
            if isinstance(one, RunRecord):
                one.words = self._words
        if not any(isinstance(one, StepMemory) for one in trainer.callbacks):
            trainer.callbacks.append(StepMemory())
        check_monitored(trainer.callbacks, self.model)
        return trainer

    def _have_alone(self, folder: Path) -> None:
        """Keep other processes out of the run until this one ends, and remove what killed ones left half-written.

        Raises:
            OSError: If another process is in it.
        """
        if not is_first_process():
            return
        is_alone = self._lock.enter_context(locked(folder / ".run.lock", f"the run {folder}", wait=False))
        freed = sum(remove_leftovers(place) for place in (folder, folder / "checkpoints")) if is_alone else 0
        if freed:
            print(f"{folder}: removed {freed / 1e6:.1f} MB of files that were half-written when the run was killed")

    def _loggers_in_folder(self, folder: Path, loggers: Any) -> Any:
        configs = self.settings.trainer.logger
        if isinstance(loggers, list):
            pairs = zip(loggers, configs, strict=True)
            return [logger_in_folder(one, arguments_of(config), folder) for one, config in pairs]
        return logger_in_folder(loggers, arguments_of(configs), folder) if isinstance(loggers, Logger) else loggers

    def after_fit(self) -> None:
        """Write the run's summary to ``summary.json``, and to the loggers that take one; say how it went."""
        if not self.trainer.is_global_zero or self.settings.trainer.fast_dev_run:
            return
        assert self.folder is not None
        seconds = time.monotonic() - self._began
        summary = run_summary(self.folder, self.trainer)
        with written_aside(self.folder / "summary.json") as aside:
            aside.write_text(json.dumps(summary, indent=2) + "\n")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(summary)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("summary", as_code(json.dumps(summary, indent=2)))
                logger.finalize("success")  # once more, for what was written after the Trainer did
        print(describe_end(self, self.folder, seconds, self._steps_before))

    def before_fit(self) -> None:
        """Read the data before a logger begins a run; take the weights of another run's checkpoint if asked for.

        Of such a checkpoint the heads are included; optimizer, schedule and epochs start afresh.

        Raises:
            ValueError: If the run is to be resumed too, or the weights are those of another model.
        """
        self._began = time.monotonic()
        begun = self.resumed or self.settings.ckpt_path
        self._steps_before = 0 if begun is None else steps_of(begun)
        data = self.datamodule
        # Where several processes check the images, each its share, they do so once they know of each other.
        if isinstance(data, MultiLabelDataModule) and not (
            data.hparams["check_images"] and self.trainer.world_size > 1
        ):
            data.setup("fit")
            data.train_dataloader()
        source = self.settings.start_from
        if source is None or self.resumed is not None:  # a resumed run has long begun
            return
        if self.settings.ckpt_path:
            raise ValueError(
                "--start_from begins a new run with a checkpoint's weights, and --ckpt_path goes on with its run: "
                "give one of them."
            )
        take_weights(self.model, source)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments that the module was built with."""
        settings: dict[str, Any] = self.settings.model.as_dict()
        return {**settings, **self._functions}

    def _where_it_stands(self) -> str:
        """How to resume an interrupted run, as a clause."""
        if self.folder is None or self.subcommand != "fit" or not (self.resumed or self._has_stepped()):
            return "nothing was written"
        last = self.folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            return f"the run in {self.folder} has no checkpoint yet"
        return f"the last checkpoint is {last}, and this goes on from it: mlssl fit --resume {self.folder}"

    def _what_fits(self, error: Exception) -> str | None:
        """After an out-of-memory error, the advice of the callback that tried smaller batches."""
        callbacks = getattr(getattr(self, "trainer", None), "callbacks", ()) if is_out_of_memory(error) else ()
        return next((one.remedy for one in callbacks if isinstance(one, StepMemory)), None)

    def _end_wandb(self) -> None:
        """Close the run in Weights & Biases that this one began; its last values are written then."""
        trainer = getattr(self, "trainer", None)
        if trainer is not None and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            if wandb.run is not None:
                wandb.finish(exit_code=int(trainer.interrupted or not trainer.state.finished))

    def _leave_no_failed_start(self) -> None:
        """A run that ended before its first step, or an evaluation that failed, takes its folder along."""
        if self.folder is None or self.resumed is not None or not is_first_process():
            return
        trainer = getattr(self, "trainer", None)
        if trainer is None or not (self._has_stepped() or trainer.state.finished):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _has_stepped(self) -> bool:
        trainer = getattr(self, "trainer", None)
        return trainer is not None and trainer.fit_loop.epoch_loop.batch_progress.total.completed > 0
