"""ONNX export: a graph of any network, for any batch size and, if the network allows, any image size."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.export.program import dynamic_shapes
from mlssl.weights.sources import Backbone

INPUT, OUTPUT = "images", "features"
"""Names in the graph: normalised images (n, C, H, W) to features (n, D)."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Check for the packages that write and run a graph.

    Raises:
        ModuleNotFoundError: Packages are missing; names the extra.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"Format 'onnx' needs {', '.join(missing)}: pip install 'mlssl[onnx]'.")


def write_onnx(source: Backbone, path: Path, header: Mapping[str, str], images: Tensor, *, any_size: bool) -> None:
    """Write the graph in torch's default opset, with the header as metadata; arguments as for `write_program`."""
    write_graph(source.backbone, path, header, images, OUTPUT, any_size=any_size)


def write_graph(
    network: nn.Module, path: Path, header: Mapping[str, str], images: Tensor, output: str, *, any_size: bool
) -> None:
    """The same for any network from images to one tensor, named `output` in the graph."""
    import onnx

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch reports its progress
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[output],
            dynamic_shapes=dynamic_shapes(any_size=any_size),
        )
    model = program.model_proto
    _name_sizes(model, sizes=("height", "width") if any_size else ())
    onnx.helper.set_model_props(model, dict(header))
    path.write_bytes(model.SerializeToString())


def load_onnx(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """The graph in onnxruntime as a module, and the code that runs it."""
    check_packages()
    if file is None:
        return source.backbone, ""
    return _Session(file), (
        f"session = onnxruntime.InferenceSession({str(file)!r})\n"
        f"features = session.run(None, {{{INPUT!r}: images.numpy()}})[0]"
    )


class _Session(nn.Module):
    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {INPUT: images.numpy()})[0])


def _name_sizes(model: Any, sizes: tuple[str, ...]) -> None:
    """Name the free dimensions of the images throughout the graph."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dims[index].dim_param: name for index, name in zip((2, 3), sizes, strict=False)}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            for old, new in names.items():
                if old in dim.dim_param:
                    dim.dim_param = re.sub(rf"\b{old}\b", new, dim.dim_param)
