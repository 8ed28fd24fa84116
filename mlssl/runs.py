"""What a run is given when its user says nothing: a folder of its own, callbacks, a log, a precision."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from mlssl.callbacks import (
    BackboneExport,
    CollapseMonitor,
    OnlineLinearProbe,
    RepresentationLogger,
    Throughput,
    ViewGridLogger,
)
from mlssl.checkpoint import AtomicCheckpointIO

RUN_FOLDER_VARIABLE = "MLSSL_RUN_FOLDER"
"""Environment variable by which the processes of one run agree on its folder."""

LOG_EVERY_N_STEPS = 10
"""Steps between two lines of the log; a run that is limited to fewer logs at its last."""


def new_run_folder(parent: str | os.PathLike[str] = "runs", name: str = "fit") -> Path:
    """Make ``parent/name-YYYYmmdd-HHMMSS``, with a number behind it where that exists already.

    The processes that the Trainer starts for further devices find the folder of the first one in ``MLSSL_RUN_FOLDER``.

    Raises:
        OSError: If the folder cannot be made (no permission, disk full).
    """
    if RUN_FOLDER_VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        folder = Path(parent) / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        os.environ[RUN_FOLDER_VARIABLE] = str(folder)
        return folder
    raise OSError(f"{Path(parent) / stem} and 998 more of its kind exist: pass another name or another runs folder.")


def run_settings(folder: Path, trainer_settings: dict[str, Any]) -> dict[str, Any]:
    """Complete Trainer arguments for a run in ``folder``: what the user gave stays, what is missing is added.

    Added are: ``metrics.csv`` beside whatever loggers there are, checkpoints in ``checkpoints/`` with the last one kept
    and written whole or not at all, the library's callbacks where none of their kind is given, the machine's precision.

    Args:
        folder: Of :func:`new_run_folder`.
        trainer_settings: Arguments of ``lightning.Trainer``; not changed.

    Returns:
        New arguments of ``lightning.Trainer``.
    """
    settings = dict(trainer_settings)
    settings["default_root_dir"] = str(folder)
    settings["precision"] = settings.get("precision") or default_precision(settings.get("accelerator", "auto"))
    settings["logger"] = [
        CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=1),
        *_loggers(settings.get("logger")),
    ]
    settings["callbacks"] = _with_defaults(folder, _as_list(settings.get("callbacks")), settings)
    settings["plugins"] = _as_list(settings.get("plugins"))
    if not any(isinstance(plugin, AtomicCheckpointIO) for plugin in settings["plugins"]):
        settings["plugins"].append(AtomicCheckpointIO())
    if settings.get("log_every_n_steps") is None:
        limits = (settings.get("limit_train_batches"), settings.get("max_steps"))
        settings["log_every_n_steps"] = min(LOG_EVERY_N_STEPS, *(_number_of_steps(limit) for limit in limits))
    return settings


def default_precision(accelerator: object = "auto") -> Literal["bf16-mixed", "32-true"]:
    """``bf16-mixed`` where the first GPU, or without one the processor, computes in bfloat16; else ``32-true``.

    Args:
        accelerator: Of the Trainer: under ``"cpu"`` a GPU does not count.
    """
    if torch.cuda.is_available() and accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    # Emulated bfloat16 is twenty times slower than float32, so only the instructions themselves count.
    has = any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    on_apple = torch.backends.mps.is_available() and accelerator != "cpu"
    return "bf16-mixed" if has and not on_apple else "32-true"


def _with_defaults(folder: Path, given: list[Callback], settings: dict[str, Any]) -> list[Callback]:
    defaults: list[Callback] = [
        OnlineLinearProbe(),
        CollapseMonitor(),
        ViewGridLogger(),
        Throughput(),
        LearningRateMonitor(logging_interval="step"),
        BackboneExport(),
        RepresentationLogger(),
    ]
    if settings.get("enable_checkpointing") is not False:
        defaults.append(ModelCheckpoint(dirpath=folder / "checkpoints", filename="{epoch}-{step}", save_last=True))
    missing = [callback for callback in defaults if not any(isinstance(one, type(callback)) for one in given)]
    return given + missing


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
