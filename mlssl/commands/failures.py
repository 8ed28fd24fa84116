"""Failures of the Trainer, the machine and the loggers, each in one sentence that says what to do."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from mlssl.commands.lightning_private import is_of_restoring
from mlssl.commands.trainer_checks import said_of_trainer
from mlssl.out_of_memory import is_out_of_memory


def said_of_failure(error: Exception, checkpoint: Any) -> str | None:
    """The sentence; None where the error says it itself, or is a fault of the code.

    Args:
        error: The exception.
        checkpoint: Path that the run resumed from, or None.
    """
    said = " ".join(str(error).split())
    if isinstance(error, ArgumentError):  # of hyper-parameters that a checkpoint brings
        return said
    if isinstance(error, MisconfigurationException) or said.startswith("Early stopping conditioned on metric"):
        return said_of_trainer(said)
    if is_out_of_memory(error):
        return f"Memory ran out ({said}): use a smaller batch_size, size or network."
    if not isinstance(error, (ValueError, OSError)) and is_of_restoring(error):
        return (
            f"{checkpoint} does not hold what this run goes on with ({type(error).__name__}: {said}): give a "
            "checkpoint that mlssl fit has saved of this model, or begin a new run with its weights, --start_from "
            f"{checkpoint}."
        )
    if type(error).__module__.partition(".")[0] == "wandb":
        return (
            f"Weights & Biases does not take the run ({said}): log in with `wandb login`, or pass "
            "--trainer.logger.offline true and send it later with `wandb sync`."
        )
    return None
