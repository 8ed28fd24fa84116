"""The `mlssl` command: words to calls. Each small command is a typed function, the Trainer's are LightningCLI."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from safetensors.torch import save_file
from torch import nn

import mlssl
from mlssl.atomic import written_aside
from mlssl.backbones import Pooling
from mlssl.data.datamodule import DatasetName, MultiLabelDataModule
from mlssl.data.records import decode_rgb
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.probe import LinearProbeResult, linear_probe
from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import new_run_folder, run_settings
from mlssl.views.blocks import BlockViews
from mlssl.visualize import draw_view_grid

USAGE = """usage: mlssl COMMAND [ARGUMENTS]

  demo        pre-train on drawn scenes for a few minutes, and see what comes out
  fit         pre-train:                 mlssl fit --config run.yaml --data.root FOLDER
  validate    features and probe of a checkpoint on the val set
  test        the same on the test set
  predict     features of every image, written to the run's folder
  linear      linear probe:              mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER
  views       draw an image's views:     mlssl views photo.jpg -o grid.png
  export      take the backbone away:    mlssl export last.ckpt -o backbone.safetensors --format timm

mlssl COMMAND --help lists the arguments of a command; --traceback shows where an error was raised.
Exit codes: 0 done, 1 interrupted or a fault of mlssl, 2 wrong input (said in one line)."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `mlssl`; those of the process by default.

    Returns:
        Exit code: 0, or 2 where the input was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(mlssl.__version__)
        return 0
    try:
        if words[0] in TRAINER_COMMANDS:
            RunCLI(words)
        elif words[0] in _COMMANDS:
            _call(words[0], words[1:])
        else:
            raise ValueError(f"there is no command {words[0]!r}: mlssl --help lists them")
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if traceback:
            raise
        print(f"mlssl: error: {_last_line(error)}", file=sys.stderr)
        return 2
    return 0


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


def demo(epochs: int | None = None, runs: str = "runs") -> None:
    """Pre-train on drawn scenes, probe the backbone against an untrained one, and say where everything lies.

    Args:
        epochs: Passes over the scenes; by default as many as a few minutes on two cores allow.
        runs: Folder of all runs.
    """
    longer = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    with as_file(files("mlssl") / "demo.yaml") as config:
        cli = RunCLI(["fit", "--config", str(config), *longer, "--runs", runs, "--name", "demo"])
    L.seed_everything(0, verbose=False)
    untrained = MultiLabelSSLModule(**cli.model_settings)
    before = _probe(untrained, cli.datamodule, "avgmax")
    after = _probe(cli.model, cli.datamodule, "avgmax")
    folder = Path(cli.trainer.default_root_dir)
    exports = ", ".join(file.name for file in sorted((folder / "exports").iterdir()))
    print(
        f"\nLinear probe on frozen features, mAP on {len(cli.datamodule.val_records)} scenes of {before.num_classes} "
        f"classes that were never trained on:\n"
        f"  untrained backbone    {before.mAP:.3f}\n"
        f"  pre-trained backbone  {after.mAP:.3f}   ({after.mAP - before.mAP:+.3f})\n\n"
        f"The run lies in {folder}:\n"
        f"  views/          what the network saw: each picture, its blocks and their views\n"
        f"  metrics.csv     losses, probe and collapse figures, images a second\n"
        f"  checkpoints/    last.ckpt, to go on from\n"
        f"  exports/        {exports}: the backbone alone\n"
        f"  config.yaml     the settings; to run them again: mlssl fit --config {folder / 'config.yaml'}"
    )


def linear(
    sources: list[str],
    dataset: DatasetName = "synthetic",
    root: str | None = None,
    eval_size: int | tuple[int, int] = 224,
    min_images_per_class: tuple[int, int] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    pooling: Pooling = "avgmax",
    batch_size: int = 64,
    num_workers: int | None = None,
    seed: int = 0,
) -> None:
    """Compare backbones by a linear probe on their frozen features of whole images.

    Args:
        sources: Checkpoints of `mlssl fit`, or names of backbones, which are then untrained.
        dataset: Format of `root`.
        root: Folder that holds the images.
        eval_size: Height and width, or one side, that whole images are resized to.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        train_split: Split to learn from; the format's training split by default.
        val_split: Split to test on; the format's val or test split by default.
        pooling: Over the last feature map: avg, max or their mean.
        batch_size: Images a step.
        num_workers: Loader processes.
        seed: Of untrained weights and of the split that chooses the regularisation.
    """
    data = MultiLabelDataModule(
        dataset,
        root,
        batch_size=batch_size,
        eval_size=eval_size,
        num_workers=num_workers,
        train_split=train_split,
        val_split=val_split,
        min_images_per_class=min_images_per_class,
    )
    data.setup()
    models = [(source, _model(source, seed)) for source in sources]
    width = max(len(source) for source in sources)
    for source, model in models:
        result = _probe(model, data, pooling, seed)
        print(f"{source:{width}}  mAP {result.mAP:.4f}  {result.num_classes} classes  strength {result.strength:g}")


def views(
    image: Path,
    size: int = 224,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    seed: int = 0,
    output: Path = Path("views.png"),
) -> None:
    """Draw an image with its blocks, and every view of every block.

    Args:
        image: File to read.
        size: Side of a view in pixels.
        rows: Rows of the block grid.
        cols: Columns of the block grid.
        overlap: Share of the image side by which blocks overlap, 0–0.5.
        seed: Of the augmentation.
        output: PNG to write; an existing one is replaced.
    """
    cut = BlockViews(size, rows, cols, overlap)
    pixels = decode_rgb(image)
    drawn = cut(pixels, np.random.default_rng(seed))
    draw_view_grid(pixels, drawn, cut.boxes(*pixels.shape[:2]), path=output, title=image.name)
    print(f"{output}: {image.name} with {cut.num_blocks} blocks and {cut.num_blocks * cut.num_branches} views")


def export(
    checkpoint: Path,
    format: Literal["timm", "torchvision", "safetensors"] | None = None,
    overwrite: bool = False,
    output: Path = Path("backbone.safetensors"),
) -> None:
    """Write the backbone of a checkpoint alone, and check that it gives the same features after loading.

    Args:
        checkpoint: Written by `mlssl fit`.
        format: Of the file; the first that can hold the backbone by default.
        overwrite: Replace an existing file.
        output: File to write.
    """
    report = export_backbone(checkpoint, output, format, overwrite=overwrite)
    print(f"{report.path}: format {report.format}, checked by {report.check}")
    print(f"largest difference of its features: {report.max_difference:.1e} of the largest feature")


_COMMANDS: dict[str, Callable[..., None]] = {"demo": demo, "linear": linear, "views": views, "export": export}


# Arguments that the signature alone does not describe: several words in a row, and a short name.
_SPECIAL_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (("sources",), {"nargs": "+", "type": str}),
    "output": (("-o", "--output"), {"type": Path}),
}


def _call(name: str, words: list[str]) -> None:
    function = _COMMANDS[name]
    parser = ArgumentParser(prog=f"mlssl {name}", description=(function.__doc__ or "").partition("\n\n")[0])
    parameters = inspect.signature(function).parameters
    special = parameters.keys() & _SPECIAL_ARGUMENTS.keys()
    for argument in special:
        flags, settings = _SPECIAL_ARGUMENTS[argument]
        default = parameters[argument].default
        parser.add_argument(*flags, **settings, **({} if default is inspect.Parameter.empty else {"default": default}))
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(special))
    function(**parser.parse_args(words).as_dict())


def _model(source: str, seed: int) -> nn.Module:
    if Path(source).suffix == ".ckpt" or Path(source).is_file():
        try:
            return MultiLabelSSLModule.load_from_checkpoint(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{source} does not load as a checkpoint of MultiLabelSSLModule: pass one that mlssl fit wrote, or the "
                "name of a backbone."
            ) from error
    L.seed_everything(seed, verbose=False)
    return MultiLabelSSLModule(source)


def _probe(model: nn.Module, data: MultiLabelDataModule, pooling: Pooling, seed: int = 0) -> LinearProbeResult:
    train, test = (
        extract_features(model, data.image_dataloader(split), pooling=pooling, progress=True)
        for split in ("train", "val")
    )
    return linear_probe(train, test, seed=seed)


def _last_line(error: Exception) -> str:
    """The sentence itself, also where a loader worker sent its whole traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Caught ") else " ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
