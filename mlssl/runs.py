"""Defaults of a run: its folder, callbacks, log and precision."""

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
"""Environment variable through which the processes of a run share its folder."""

_MAX_WAIT = timedelta(minutes=30)
"""Time to wait for the first process of a run, as long as process groups wait by default."""

_FOLDERS = itertools.count()
"""Number of runs of this process so far, the same in all processes."""

_STORES: list[Any] = []
"""Stores of the first process, kept for processes that ask later."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK")
"""Variables of torchrun, Lightning and MPI; Lightning itself handles those of SLURM and LSF."""

_LAST_OF_USER = "last_of_callback"
"""File of a user's ModelCheckpoint with ``save_last``: ``last.ckpt`` is the library's, to resume from."""

LOG_EVERY_N_STEPS = 10
"""Steps between two rows of the log; a shorter run logs at its last step."""


def new_run_folder(parent: str | os.PathLike[str] = "runs", name: str = "fit") -> Path:
    """Create ``parent/name-YYYYmmdd-HHMMSS``, with a number appended if that exists already.

    All processes of a run share one folder, which the first one creates. Processes started by torchrun or srun receive
    it over the network, and wait for it; those started by the Trainer read it from ``MLSSL_RUN_FOLDER``.

    Raises:
        OSError: If the folder cannot be created (no permission, disk full), or the first process does not send it.
    """
    environment = _cluster_environment()
    if environment is not None:
        folder = _from_first_process(environment, lambda: str(_create_folder(parent, name)))
    elif RUN_FOLDER_VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    else:
        folder = str(_create_folder(parent, name))
    os.environ[RUN_FOLDER_VARIABLE] = folder
    return Path(folder)


def is_first_process() -> bool:
    """Whether this process is the first or only one of its run, according to the launcher's variables."""
    by_lightning = rank_zero_only.rank  # type: ignore[attr-defined]
    ranks = (by_lightning, *(os.environ.get(name) for name in _RANKS))
    return not any(int(rank or 0) for rank in ranks)


def run_settings(
    folder: Path, trainer_settings: dict[str, Any], *, checkpoint: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Complete Trainer arguments for a run in ``folder``: the user's arguments are kept, missing ones are added.

    Added are: ``metrics.csv`` in addition to other loggers, atomic checkpoints in ``checkpoints/`` with the last one
    kept, the library's callbacks unless one of their kind is given, one progress bar for the whole run, and the
    machine's precision. A ModelCheckpoint of the user saves in addition, also to ``checkpoints/`` if it has no
    ``dirpath``; its last checkpoint is called ``last_of_callback.ckpt`` there.

    Args:
        folder: Result of :func:`new_run_folder`.
        trainer_settings: Arguments of ``lightning.Trainer``; not changed.
        checkpoint: Checkpoint from which the run of this folder resumes: ``metrics.csv`` is continued from its step.

    Returns:
        New arguments of ``lightning.Trainer``.

    Raises:
        ValueError: If a given RunCheckpoint saves nothing to resume from.
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
    if settings.get("enable_model_summary") is None:  # the summary at the start contains the number of parameters
        settings["enable_model_summary"] = False
    if settings.get("log_every_n_steps") is None:
        limits = (settings.get("limit_train_batches"), settings.get("max_steps"))
        settings["log_every_n_steps"] = min(LOG_EVERY_N_STEPS, *(_number_of_steps(limit) for limit in limits))
        settings["callbacks"].append(_LogShortEpochs())
    return settings


def logger_in_folder(logger: Logger, arguments: dict[str, Any], folder: Path) -> Logger:
    """The same logger with its files in the run's folder, unless it has another folder than ``"."``.

    A run in Weights & Biases is named after the folder, unless it has a name; one with files in the folder continues
    under its id. TensorBoard's files are in ``tensorboard/``. Other loggers do not change.

    Args:
        logger: The logger as built.
        arguments: Its constructor arguments.
        folder: Folder of the run.
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
        folder: Folder of the run.
        trainer: Trainer after the fit.
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


def _create_folder(parent: str | os.PathLike[str], name: str) -> Path:
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        folder = Path(parent) / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(
                f"{folder} cannot be created for the run ({error.strerror}): pass another folder, --runs "
                "FOLDER, or check its permissions."
            ) from error
        return folder
    raise OSError(f"{Path(parent) / stem} and 998 numbered folders exist: pass another name or another runs folder.")


def _cluster_environment() -> ClusterEnvironment | None:
    """Rank and address of this process under torchrun or srun; None if neither started several."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment() if int(os.environ["WORLD_SIZE"]) > 1 else None
    # Use the step's variables: a script without srun has those of the whole job.
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return SLURMEnvironment() if several and SLURMEnvironment.detect() else None


def _from_first_process(environment: ClusterEnvironment, make: Callable[[], str]) -> str:
    """The result of `make` in the first process, for all processes; there is no process group yet, only its address.

    Raises:
        OSError: If the first process sends nothing.
    """
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    is_first, restart = environment.global_rank() == 0, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"{RUN_FOLDER_VARIABLE}-{restart}-{next(_FOLDERS)}"
    # torchrun has its own store at this address; under srun the process group will join this one.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=is_first and not has_store,
            timeout=_MAX_WAIT,
            wait_for_workers=False,
            multi_tenant=True,
        )
        if not is_first:
            received: bytes = store.get(key)
            return received.decode()
        _STORES.append(store)
        result = make()  # if it fails, this process ends, which ends the wait of the others
        store.set(key, result)
        return result
    except DistError as error:
        raise OSError(
            f"The first process of the run, at {environment.main_address}:{environment.main_port}, did not send its "
            f"folder to the others: check its output. {str(error).splitlines()[0]}"
        ) from error


def _wandb_id(folder: Path) -> str | None:
    """Id of the run with files in ``wandb/run-<date>_<time>-<id>`` or ``offline-run-…``; None without one."""
    names = sorted(entry.name for entry in folder.glob("wandb/*run-*") if entry.is_dir())
    found = [match[1] for match in (re.fullmatch(r"(?:offline-)?run-\d+_\d+-(.+)", name) for name in names) if match]
    return found[-1] if found else None


def steps_of(checkpoint: str | os.PathLike[str]) -> int:
    """Number of completed steps in a checkpoint, as counted by the log."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    # Within a step Lightning saves the count before it, and adds one on a resume.
    is_within = bool(batches["completed"] < batches["ready"])
    return stepped_batches(saved) + is_within


def default_precision(accelerator: object = "auto") -> Literal["bf16-mixed", "32-true"]:
    """``bf16-mixed`` if the first GPU, or without one the CPU, computes in bfloat16; else ``32-true``.

    Args:
        accelerator: Setting of the Trainer: ``"cpu"`` ignores GPUs.
    """
    if _on_processor(accelerator):
        return "bf16-mixed" if processor_has_bfloat16() else "32-true"
    has = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has else "32-true"


def _on_processor(accelerator: object) -> bool:
    return accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())


class _LogShortEpochs(Callback):
    """Log an epoch with fewer steps than the logging interval at its last step."""

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
    """The callback that keeps ``last.ckpt``, in addition to those of the user, which get the run's folder by default.

    Raises:
        ValueError: If a given RunCheckpoint saves nothing to resume from.
    """
    others = [one for one in given if isinstance(one, ModelCheckpoint)]
    directory = os.path.realpath(checkpoints)
    for saver in others:
        saver.dirpath = saver.dirpath or directory
        if isinstance(saver, RunCheckpoint):
            if not saver.save_last or saver.save_weights_only or saver.dirpath != directory:
                raise ValueError(
                    f"A RunCheckpoint with save_last={saver.save_last}, save_weights_only={saver.save_weights_only}, "
                    f"dirpath={str(saver.dirpath)!r} was given, but a run resumes from the last.ckpt of its own "
                    "folder: pass save_last=True and leave the other two out, or pass a ModelCheckpoint."
                )
        elif saver.dirpath == directory:
            saver.CHECKPOINT_NAME_LAST = _LAST_OF_USER
    return RunCheckpoint(checkpoints, filename="run-{epoch}-{step}" if others else "{epoch}-{step}", save_last=True)


def _stands_for(given: Callback, default: Callback) -> bool:
    """Whether a callback is of the default's kind and evaluates the same network, or saves at the same times."""
    if isinstance(given, RunCheckpoint) and isinstance(default, RunCheckpoint):
        return given.state_key == default.state_key
    networks = {getattr(one, "network", "backbone") for one in (given, default)}
    return isinstance(given, type(default)) and len(networks) == 1


def _number_of_steps(limit: float | None) -> int:
    """A limit for the Trainer: a float up to 1 is a fraction, a larger one from the parser becomes an int."""
    if limit is None or limit < 1 or (limit == 1 and isinstance(limit, float)):
        return LOG_EVERY_N_STEPS
    return int(limit)


def _loggers(logger: Logger | Sequence[Logger] | bool | None) -> list[Logger]:
    return [] if isinstance(logger, bool) else _as_list(logger)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
