"""`mlssl fit`, `validate` and `test`: LightningCLI with one folder per run."""

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
from mlssl.commands.argument_errors import plain_message
from mlssl.commands.begins_with import resolve_run_folders, take_published_weights, weights_message
from mlssl.commands.custom_code import import_object, is_import_path, make_importable
from mlssl.commands.end_of_fit import describe_end
from mlssl.commands.failures import failure_message
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
"""Arguments of the module that take a name of the library, or the import path of a custom function."""

_ARCHITECTURE = ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim")


class RunCLI(OpenCLI):
    """LightningCLI for :class:`MultiLabelSSLModule` or a custom class, with one folder per run, see `mlssl.runs`.

    Args:
        words: Words after `mlssl`; the first is the command.
        model: Class to build; None: the one named by the words or a config, else `MultiLabelSSLModule`.
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
        self._start_time, self._steps_before = 0.0, 0
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
                self._lock_folder(self.folder)
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
            raise KeyboardInterrupt(self._how_to_resume()) from None
        except Exception as error:
            gone = self._others.describe_ended(error)
            if gone is not None:
                raise ChildProcessError(gone) from error
            path = self.resumed or (self.settings.get("ckpt_path") if "config" in vars(self) else None)
            said = self._memory_advice(error) or failure_message(error, path)
            if said is None:
                raise
            raise ValueError(said) from error
        finally:
            self._end_wandb()
            self._lock.close()
            self._remove_failed_start()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name and parent of the run's folder, what a run starts from, and one seed for weights and views."""
        parser.add_argument("--name", type=str, default=None, help="Name of the run; its folder is RUNS/NAME-<time>.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder in which runs are created.")
        parser.add_argument(
            "--resume",
            type=str,
            default=None,
            help="Folder of a run to resume, with its config; other options, such as more epochs, override it. The "
            "classes and functions named in its config.yaml are imported: resume only runs that you trust.",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="fit: Checkpoint whose weights a new run starts from, with its own schedule and any data.",
        )
        parser.add_argument(
            "--recipe",
            type=str | None,
            default=None,
            help="Recipe, or its YAML file, for settings that neither --config nor another option gives.",
        )
        parser.add_argument("--model_class", type=str | None, default=None, help="Import path given by --model.")
        parser.add_argument("--data_class", type=str | None, default=None, help="Import path given by --data.")
        if "data.seed" in parser.get_defaults():
            parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given words, not those of the process; suggest the nearest setting for a misspelt one."""
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
            raise ValueError(plain_message(str(error), args[0], known)) from error
        resolve_run_folders(self.settings)
        given = self.settings.model
        self._functions = {
            name: import_object(given[name], f"--model.{name}") for name in FUNCTIONS if is_import_path(given.get(name))
        }

    def read_checkpoint(self) -> None:
        """Take from the checkpoint the module's arguments that the user did not give.

        Raises:
            ValueError: If it has another architecture than was given, was trained with a function that is not given
                again, or names code to import.
        """
        path = self.resumed or self.settings.get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        content = load_plain(Path(path))
        if self.config.subcommand == "fit":
            check_resumable(content, Path(path))
        if self.resumed is not None:  # its settings are in its config
            return
        check_content(content, Path(path))
        saved = content.get("hyper_parameters") or {}
        given, defaults = self.settings.model, self.command_parser.get_defaults()["model"]
        taken = {}
        for name, value in plain_hyper_parameters(saved, self._model_kind, str(path)).items():
            if name not in defaults:
                continue
            if given[name] == defaults[name]:
                taken[name] = value
            elif name in _ARCHITECTURE and given[name] != value:
                raise ValueError(
                    f"The checkpoint has another architecture, {name}={value!r}, but {given[name]!r} was given: leave "
                    "out the setting or the checkpoint."
                )
        check_downloads_nothing(taken, path)
        for name in FUNCTIONS:
            is_default = given.get(name) == defaults.get(name)
            if self.config.subcommand == "fit" and is_custom(saved.get(name)) and is_default:
                raise ValueError(
                    f"The checkpoint was trained with {name}={saved[name]!r}, a function that it does not contain: "
                    f"pass it again, --model.{name} {saved[name].split()[-1]}."
                )
        self.config = self.parser.parse_object({self.config.subcommand: {"model": taken}}, self.config)

    def instantiate_classes(self) -> None:
        """Build data, module and Trainer; the saved config stores functions as text."""
        weights = None if self.resumed else take_published_weights(self.settings)
        config = self.config.clone()
        for name, function in self._functions.items():
            config[self.subcommand].model[name] = function
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except ValueError as error:
            if "Does not validate" not in str(error):  # raised by a class itself
                raise
            raise ValueError(plain_message(str(error), str(self.subcommand), ())) from error
        except Exception as error:
            said = weights_message(weights, error)
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
            self._lock_folder(self.folder)
        else:  # not in self.config, which is saved: the run did not start from its own checkpoint
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

    def _lock_folder(self, folder: Path) -> None:
        """Lock the run until this process ends, and remove files that killed processes left half-written.

        Raises:
            OSError: If another process has locked it.
        """
        if not is_first_process():
            return
        is_alone = self._lock.enter_context(locked(folder / ".run.lock", f"the run {folder}", wait=False))
        freed = sum(remove_leftovers(each) for each in (folder, folder / "checkpoints")) if is_alone else 0
        if freed:
            print(f"{folder}: removed {freed / 1e6:.1f} MB of half-written files of a killed run")

    def _loggers_in_folder(self, folder: Path, loggers: Any) -> Any:
        configs = self.settings.trainer.logger
        if isinstance(loggers, list):
            pairs = zip(loggers, configs, strict=True)
            return [logger_in_folder(one, arguments_of(config), folder) for one, config in pairs]
        return logger_in_folder(loggers, arguments_of(configs), folder) if isinstance(loggers, Logger) else loggers

    def after_fit(self) -> None:
        """Write the run's summary to ``summary.json`` and to the loggers that take one, and print the results."""
        if not self.trainer.is_global_zero or self.settings.trainer.fast_dev_run:
            return
        assert self.folder is not None
        seconds = time.monotonic() - self._start_time
        summary = run_summary(self.folder, self.trainer)
        with written_aside(self.folder / "summary.json") as aside:
            aside.write_text(json.dumps(summary, indent=2) + "\n")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(summary)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("summary", as_code(json.dumps(summary, indent=2)))
                logger.finalize("success")  # again: the summary was written after the Trainer finalized
        print(describe_end(self, self.folder, seconds, self._steps_before))

    def before_fit(self) -> None:
        """Read the data before a logger starts a run; load the weights of ``--start_from``.

        The heads are loaded too; optimizer, schedule and epochs start anew.

        Raises:
            ValueError: If the run is resumed as well, or the weights are of another model.
        """
        self._start_time = time.monotonic()
        begun = self.resumed or self.settings.ckpt_path
        self._steps_before = 0 if begun is None else steps_of(begun)
        data = self.datamodule
        # Several processes share the check of the images, so it waits until their process group exists.
        if isinstance(data, MultiLabelDataModule) and not (
            data.hparams["check_images"] and self.trainer.world_size > 1
        ):
            data.setup("fit")
            data.train_dataloader()
        source = self.settings.start_from
        if source is None or self.resumed is not None:  # a resumed run already has its weights
            return
        if self.settings.ckpt_path:
            raise ValueError(
                "--start_from starts a new run from a checkpoint's weights, --ckpt_path resumes its run: pass one of "
                "them."
            )
        take_weights(self.model, source)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Arguments of the module."""
        settings: dict[str, Any] = self.settings.model.as_dict()
        return {**settings, **self._functions}

    def _how_to_resume(self) -> str:
        """How to resume an interrupted run, as a clause."""
        if self.folder is None or self.subcommand != "fit" or not (self.resumed or self._has_stepped()):
            return "nothing was written"
        last = self.folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            return f"the run in {self.folder} has no checkpoint yet"
        return f"the last checkpoint is {last}; to resume: mlssl fit --resume {self.folder}"

    def _memory_advice(self, error: Exception) -> str | None:
        """After an out-of-memory error, the advice of the callback that tries smaller batches."""
        callbacks = getattr(getattr(self, "trainer", None), "callbacks", ()) if is_out_of_memory(error) else ()
        return next((one.remedy for one in callbacks if isinstance(one, StepMemory)), None)

    def _end_wandb(self) -> None:
        """Finish the Weights & Biases run that this run started, which writes its last values."""
        trainer = getattr(self, "trainer", None)
        if trainer is not None and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            if wandb.run is not None:
                wandb.finish(exit_code=int(trainer.interrupted or not trainer.state.finished))

    def _remove_failed_start(self) -> None:
        """Remove the folder of a run that ended before its first step, and of a failed evaluation."""
        if self.folder is None or self.resumed is not None or not is_first_process():
            return
        trainer = getattr(self, "trainer", None)
        if trainer is None or not (self._has_stepped() or trainer.state.finished):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _has_stepped(self) -> bool:
        trainer = getattr(self, "trainer", None)
        return trainer is not None and trainer.fit_loop.epoch_loop.batch_progress.total.completed > 0
