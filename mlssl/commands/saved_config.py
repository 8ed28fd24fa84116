"""Write the config of a run to its folder and its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from mlssl.atomic import written_aside


class SaveConfig(SaveConfigCallback):
    """Writes the config of a run to its folder, and to the loggers that take one."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Write config.yaml; if a run resumes with other settings, keep the previous file as config-before-<n>.yaml."""
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
                logger.experiment.add_text("config", as_code(text))


def as_code(text: str) -> str:
    """Text as a Markdown code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def arguments_of(config: Any) -> dict[str, Any]:
    """Arguments of a class in the parser's config."""
    init_args, others = config.get("init_args"), config.get("dict_kwargs")
    return {**(init_args.as_dict() if init_args else {}), **(dict(others) if others else {})}


def name_of_class(callback: Any) -> str:
    """Class name of a callback in a config, without its import path."""
    return str(callback["class_path"]).rpartition(".")[2]
