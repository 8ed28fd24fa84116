"""The largest difference of features after an export, for each architecture and format: the table of docs/export.md.

`python examples/export_table.py`; fresh weights, norms as after training. A cell is a fraction of the largest feature.
"""

import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import nn
from tqdm import tqdm

from mlssl import export_backbone
from mlssl.backbones import build_backbone
from mlssl.export import EXPORT_SUFFIXES, fitting_format

ARCHITECTURES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "torchvision/resnet50",
    "convnext_tiny",
    "torchvision/convnext_tiny",
    "vit_small_patch16_224",
    "torchvision/vit_b_16",
    "regnety_004",
    "torchvision/regnet_y_400mf",
]


def main(architectures: list[str] = ARCHITECTURES, formats: list[str] = list(EXPORT_SUFFIXES)) -> None:  # noqa: B006
    """Export every architecture in every format that supports it, and print the differences.

    Args:
        architectures: Names as mlssl takes them.
        formats: Of the export.
    """
    rows = []
    for name in tqdm(architectures, unit="architecture"):
        torch.manual_seed(0)
        network = after_training(build_backbone(name))
        rows.append(f"| {name} | {' | '.join(difference(network, format) for format in formats)} |")
    print(f"| architecture | {' | '.join(formats)} |", "|---" * (1 + len(formats)) + "|", *rows, sep="\n")


def after_training(network: nn.Module) -> nn.Module:
    """Norms off their first values, so that one left out of a file would show."""
    for layer in network.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(layer, name, None)
            if "Norm" in type(layer).__name__ and value is not None:
                value.data.uniform_(0.5, 1)
    return network


def difference(network: nn.Module, format: str) -> str:
    try:
        fitting_format(network, format)
    except ValueError:
        return "—"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"backbone{EXPORT_SUFFIXES[format][0]}"
        return f"{export_backbone(network, path, format).max_difference:.0e}"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
