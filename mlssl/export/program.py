"""torch.export programs of any network, for any batch size; also the source of the ONNX graph."""

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
    """Free dimensions of the images: the batch size, and on request height and width."""
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if any_size else {}
    return ({0: torch.export.Dim("batch"), **sizes},)


def write_program(source: Backbone, path: Path, header: Mapping[str, str], images: Tensor, *, any_size: bool) -> None:
    """Write a program for `torch.export.load`, with the header as an extra file.

    Args:
        source: Network to trace.
        path: File to write, .pt2.
        header: Metadata.
        images: Normalised (2, C, H, W); define the size of a fixed-size program.
        any_size: Whether the program accepts other heights and widths.
    """
    with warnings.catch_warnings():  # torch reports its progress
        warnings.simplefilter("ignore")
        program = torch.export.export(source.backbone, (images,), dynamic_shapes=dynamic_shapes(any_size=any_size))
        torch.export.save(program, path, extra_files={HEADER: json.dumps(dict(header))})


def load_program(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """The program as a module, and the code that loads it."""
    if file is None:
        return source.backbone, ""
    program = torch.export.load(file)
    return _Program(program.module()), f"network = torch.export.load({str(file)!r}).module()"


class _Program(nn.Module):
    """Module of a program, without an eval mode: its behaviour was fixed at export."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self._traced = (traced,)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._traced[0](images)
        return features
