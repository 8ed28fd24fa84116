"""What a run is given when its user says nothing: a folder of its own, callbacks, a log, a precision."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mlssl.callbacks import (
    BackboneExport,
    CollapseMonitor,
    LearningRate,
    OnlineLinearProbe,
    RandomState,
    RepresentationLogger,
    RunBar,
    RunRecord,
    RunTime,
    SmallMaps,
    Throughput,
    ViewGridLogger,
)
from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.metrics_file import MetricsFile
from mlssl.private import processor_has_bfloat16, stepped_batches
from mlssl.run_folder import read_log

RUN_FOLDER_VARIABLE = "MLSSL_RUN_FOLDER"
"""Environment variable by which the processes of one run agree on its folder."""

_LONGEST_WAIT = timedelta(minutes=30)
"""For the first process of a run, as process groups wait by default."""

_FOLDERS = itertools.count()
"""Runs of this process so far: all processes count alike."""

_STORES: list[Any] = []
"""Kept by the first process for those that ask later."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK")
"""Variables of torchrun, of Lightning and of MPI; Lightning itself knows SLURM's and LSF's."""

_LAST_OF_USER = "last_of_callback"
"""What ``save_last`` of a user's ModelCheckpoint writes: ``last.ckpt`` is the library's, to resume from."""

LOG_EVERY_N_STEPS = 10
"""Steps between two lines of the log; a run that is limited to fewer logs at its last."""


def new_run_folder(parent: str | os.PathLike[str] = "runs", name: str = "fit") -> Path:
    """Make ``parent/name-YYYYmmdd-HHMMSS``, with a number behind it where that exists already.

    All processes of a run have one folder, which the first of them makes. Those that torchrun or srun start are told
    it over the network, and wait for it; those that the Trainer starts find it in ``MLSSL_RUN_FOLDER``.

    Raises:
        OSError: If the folder cannot be made (no permission, disk full), or the first process does not tell it.
    """
    place = _place_among_processes()
    if place is not None:
        folder = _told_by_the_first(place, lambda: str(_made_folder(parent, name)))
    elif RUN_FOLDER_VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    else:
        folder = str(_made_folder(parent, name))
    os.environ[RUN_FOLDER_VARIABLE] = folder
    return Path(folder)


def is_first_process() -> bool:
    """Whether this process is the first of its run, or the only one, by the variables of whatever started it."""
    by_lightning = rank_zero_only.rank  # type: ignore[attr-defined]
    ranks = (by_lightning, *(os.environ.get(name) for name in _RANKS))
    return not any(int(rank or 0) for rank in ranks)


def run_settings(
    folder: Path, trainer_settings: dict[str, Any], *, checkpoint: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Complete Trainer arguments for a run in ``folder``: what the user gave stays, what is missing is added.

    Added are: ``metrics.csv`` beside whatever loggers there are, checkpoints in ``checkpoints/`` with the last one kept
    and written whole or not at all, the library's callbacks where none of their kind is given, one bar for the whole
    run, the machine's precision.
    A ModelCheckpoint of the user's saves in addition, also to ``checkpoints/`` where it has no ``dirpath``; its own
    last checkpoint is called ``last_of_callback.ckpt`` there.

    Args:
        folder: Of :func:`new_run_folder`.
        trainer_settings: Arguments of ``lightning.Trainer``; not changed.
        checkpoint: From which the run of this folder resumes: ``metrics.csv`` is continued from its step.

    Returns:
        New arguments of ``lightning.Trainer``.

    Raises:
        ValueError: If a RunCheckpoint was given that saves nothing to resume from.
    """
    settings = dict(trainer_settings)
    settings["default_root_dir"] = str(folder)
    settings["precision"] = settings.get("precision") or default_precision(settings.get("accelerator", "auto"))
    settings["logger"] = [
        MetricsFile(folder, None if checkpoint is None else steps_of(checkpoint)),
        *_loggers(settings.get("logger")),
    ]
    settings["callbacks"] = _with_defaults(folder, _as_list(settings.get("callbacks")), settings)
    settings["plugins"] = _as_list(settings.get("plugins"))
    if not any(isinstance(plugin, AtomicCheckpointIO) for plugin in settings["plugins"]):
        settings["plugins"].append(AtomicCheckpointIO())
    has_bar = any(isinstance(one, ProgressBar) for one in settings["callbacks"])
    if settings.get("enable_progress_bar") is not False and not has_bar:
        settings["callbacks"].append(RunBar())
    if settings.get("enable_model_summary") is None:  # the block at the start has its number of parameters
        settings["enable_model_summary"] = False
    if settings.get("log_every_n_steps") is None:
        limits = (settings.get("limit_train_batches"), settings.get("max_steps"))
        settings["log_every_n_steps"] = min(LOG_EVERY_N_STEPS, *(_number_of_steps(limit) for limit in limits))
        settings["callbacks"].append(_LogShortEpochs())
    return settings


def logger_in_folder(logger: Logger, arguments: dict[str, Any], folder: Path) -> Logger:
    """The same logger with its files in the run's folder, unless it was given another folder than ``"."``.

    A run in Weights & Biases is called as the folder, unless it was given a name; one that left files in the folder
    goes on under its id. TensorBoard's files are in ``tensorboard/``. Other loggers are left as they are.

    Args:
        logger: As it was built.
        arguments: What it was built with.
        folder: Of the run.
    """
    if not isinstance(logger, (WandbLogger, TensorBoardLogger)) or arguments.get("save_dir", ".") != ".":
        return logger
    if isinstance(logger, TensorBoardLogger):
        return type(logger)(**{**arguments, "save_dir": str(folder), "name": "", "version": "tensorboard"})
    name, run_id = arguments.get("name") or folder.name, arguments.get("id") or _wandb_id(folder)
    return type(logger)(**{**arguments, "save_dir": str(folder), "name": name, "id": run_id})


def run_summary(folder: Path, trainer: L.Trainer) -> dict[str, Any]:
    """Results of a fit: epochs, steps, the last value of each metric, the best ``probe/mAP``, the paths of its files.

    Args:
        folder: Of the run.
        trainer: That has ended the fit.
    """
    log = read_log(folder)
    last = {name: logged.values[-1] for name, logged in log.items()}
    best = {"probe/best_mAP": max(log["probe/mAP"].values)} if "probe/mAP" in log else {}
    savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    last_checkpoint = next((one.last_model_path for one in savers if isinstance(one, RunCheckpoint)), "")
    best_checkpoint = next((one.best_model_path for one in savers if one.monitor), "")
    return {
        **last,
        **best,
        "run/folder": str(folder),
        "run/epochs": trainer.current_epoch,
        "run/steps": trainer.global_step,
        "run/checkpoint": last_checkpoint,
        **({"run/best_checkpoint": best_checkpoint} if best_checkpoint else {}),
        "run/exports": [str(path) for path in sorted(folder.glob("exports/*"))],
    }


def _made_folder(parent: str | os.PathLike[str], name: str) -> Path:
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        folder = Path(parent) / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(
                f"{folder} cannot be made for the run ({error.strerror}): pass another place, --runs FOLDER, or see to "
                "its permissions."
            ) from error
        return folder
    raise OSError(f"{Path(parent) / stem} and 998 more of its kind exist: pass another name or another runs folder.")


def _place_among_processes() -> ClusterEnvironment | None:
    """Where torchrun or srun put this process; None where neither started several."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment() if int(os.environ["WORLD_SIZE"]) > 1 else None
    # Of the step, because a script without srun has the numbers of the whole job.
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return SLURMEnvironment() if several and SLURMEnvironment.detect() else None


def _told_by_the_first(place: ClusterEnvironment, make: Callable[[], str]) -> str:
    """What `make` gives in the first of all processes; there is no process group yet, only its address and port.

    Raises:
        OSError: If the first process says nothing.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    is_first, restart = place.global_rank() == 0, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"{RUN_FOLDER_VARIABLE}-{restart}-{next(_FOLDERS)}"
    # torchrun has a store of its own at this address; under srun that of the process group will join this one.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            place.main_address,
            place.main_port,
            is_master=is_first and not has_store,
            timeout=_LONGEST_WAIT,
            wait_for_workers=False,
            multi_tenant=True,
        )
        if not is_first:
            told: bytes = store.get(key)
            return told.decode()
        _STORES.append(store)
        made = make()  # where it fails, this process ends, and so does the others' wait
        store.set(key, made)
        return made
    except DistError as error:
        raise OSError(
            f"The first process of the run, at {place.main_address}:{place.main_port}, did not tell the others its "
            f"folder: look at what it printed. {str(error).splitlines()[0]}"
        ) from error


def _wandb_id(folder: Path) -> str | None:
    """Of the run that left its files in ``wandb/run-<date>_<time>-<id>`` or ``offline-run-…``; None without one."""
    names = sorted(entry.name for entry in folder.glob("wandb/*run-*") if entry.is_dir())
    found = [match[1] for match in (re.fullmatch(r"(?:offline-)?run-\d+_\d+-(.+)", name) for name in names) if match]
    return found[-1] if found else None


def steps_of(checkpoint: str | os.PathLike[str]) -> int:
    """Batches that had been stepped on when it was saved, by which the log counts."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    # Within a step Lightning saves the number before it, and adds one when it resumes.
    is_within = bool(batches["completed"] < batches["ready"])
    return stepped_batches(saved) + is_within


def default_precision(accelerator: object = "auto") -> Literal["bf16-mixed", "32-true"]:
    """``bf16-mixed`` where the first GPU, or without one the processor, computes in bfloat16; else ``32-true``.

    Args:
        accelerator: Of the Trainer: under ``"cpu"`` a GPU does not count.
    """
    if _on_processor(accelerator):
        return "bf16-mixed" if processor_has_bfloat16() else "32-true"
    has = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has else "32-true"


def _on_processor(accelerator: object) -> bool:
    return accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())


class _LogShortEpochs(Callback):
    """An epoch with fewer steps than the logging interval is logged at its last step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, MultiLabelDataModule) and data.train_records is not None:
            steps = len(data.train_records) // (data.hparams["batch_size"] * trainer.world_size)
            trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps))  # type: ignore[attr-defined]


def _with_defaults(folder: Path, given: list[Callback], settings: dict[str, Any]) -> list[Callback]:
    defaults: list[Callback] = [
        OnlineLinearProbe(),
        CollapseMonitor(),
        ViewGridLogger(),
        Throughput(),
        LearningRate(),
        BackboneExport(),
        RandomState(),
        RepresentationLogger(),
        RunTime(),
        RunRecord(),
    ]
    if settings.get("enable_checkpointing") is not False:
        defaults.append(_saver(folder / "checkpoints", given))
    if _on_processor(settings.get("accelerator", "auto")):
        defaults.append(SmallMaps())
    return given + [default for default in defaults if not any(_stands_for(one, default) for one in given)]


def _saver(checkpoints: Path, given: list[Callback]) -> RunCheckpoint:
    """What keeps ``last.ckpt``, in addition to savers of the user's, which get the run's folder where they name none.

    Raises:
        ValueError: If a RunCheckpoint was given that saves nothing to resume from.
    """
    others = [one for one in given if isinstance(one, ModelCheckpoint)]
    place = os.path.realpath(checkpoints)
    for saver in others:
        saver.dirpath = saver.dirpath or place
        if isinstance(saver, RunCheckpoint):
            if not saver.save_last or saver.save_weights_only or saver.dirpath != place:
                raise ValueError(
                    f"A RunCheckpoint with save_last={saver.save_last}, save_weights_only={saver.save_weights_only}, "
                    f"dirpath={str(saver.dirpath)!r} was given, and a run goes on from the last.ckpt of its own "
                    "folder: pass save_last=True and leave the other two out, or pass a ModelCheckpoint."
                )
        elif saver.dirpath == place:
            saver.CHECKPOINT_NAME_LAST = _LAST_OF_USER
    return RunCheckpoint(checkpoints, filename="run-{epoch}-{step}" if others else "{epoch}-{step}", save_last=True)


def _stands_for(given: Callback, default: Callback) -> bool:
    """Whether a callback is of the default's kind and evaluates the same network; a saver: at the same times."""
    if isinstance(given, RunCheckpoint) and isinstance(default, RunCheckpoint):
        return given.state_key == default.state_key
    networks = {getattr(one, "network", "backbone") for one in (given, default)}
    return isinstance(given, type(default)) and len(networks) == 1


def _number_of_steps(limit: float | None) -> int:
    """As the Trainer takes a limit: a float up to 1 is a share, a larger one, as the parser may make it, a number."""
    if limit is None or limit < 1 or (limit == 1 and isinstance(limit, float)):
        return LOG_EVERY_N_STEPS
    return int(limit)


def _loggers(logger: Logger | Sequence[Logger] | bool | None) -> list[Logger]:
    return [] if isinstance(logger, bool) else _as_list(logger)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
