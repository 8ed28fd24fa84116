"""Graphs of any network, for batches of any number: torch.export's program, from which the ONNX graph is made too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.weights.sources import Backbone

HEADER = "mlssl.json"
"""Name of the header among the extra files of a program."""


def dynamic_shapes(*, any_size: bool) -> tuple[dict[int, Any]]:
    """Which dimensions of the images are free: their number, and where asked for height and width."""
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if any_size else {}
    return ({0: torch.export.Dim("batch"), **sizes},)


def write_program(source: Backbone, path: Path, header: Mapping[str, str], images: Tensor, *, any_size: bool) -> None:
    """The program that `torch.export.load` reads, with the header as an extra file.

    Args:
        source: Network to trace.
        path: File to write, .pt2.
        header: What it says of itself.
        images: Normalised (2, C, H, W); their height and width are those of a program of fixed size.
        any_size: Whether it takes images of other heights and widths too.
    """
    with warnings.catch_warnings():  # torch's remarks on its own progress
        warnings.simplefilter("ignore")
        program = torch.export.export(source.backbone, (images,), dynamic_shapes=dynamic_shapes(any_size=any_size))
        torch.export.save(program, path, extra_files={HEADER: json.dumps(dict(header))})


def load_program(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """The program as a module that gives features; and the line that loads it."""
    if file is None:
        return source.backbone, ""
    program = torch.export.load(file)
    return _Program(program.module()), f"network = torch.export.load({str(file)!r}).module()"


class _Program(nn.Module):
    """A program's module, which has no eval mode: what it does was fixed when it was exported."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self._traced = (traced,)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._traced[0](images)
        return features
