"""Failures of the Trainer, the machine and the loggers, each in one sentence that says what to do."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mlssl.commands.lightning_private import is_restore_error
from mlssl.commands.trainer_checks import trainer_message
from mlssl.out_of_memory import is_out_of_memory


def failure_message(error: Exception, checkpoint: Any) -> str | None:
    """The sentence; None if the error already says what to do, or is a bug.

    Args:
        error: The exception.
        checkpoint: Path that the run resumed from, or None.
    """
    said = " ".join(str(error).split())
    if isinstance(error, ArgumentError):  # from the hyper-parameters of a checkpoint
        return said
    if isinstance(error, MisconfigurationException) or said.startswith("Early stopping conditioned on metric"):
        return trainer_message(said)
    if is_out_of_memory(error):
        return f"Out of memory ({said}): use a smaller batch_size, size or network."
    if not isinstance(error, (ValueError, OSError)) and is_restore_error(error):
        return (
            f"{checkpoint} cannot be resumed ({type(error).__name__}: {said}): pass a checkpoint that mlssl fit saved "
            f"for this model, or start a new run from its weights, --start_from {checkpoint}."
        )
    if type(error).__module__.partition(".")[0] == "wandb":
        return (
            f"Weights & Biases refused the run ({said}): log in with `wandb login`, or pass "
            "--trainer.logger.offline true and send it later with `wandb sync`."
        )
    return None
