"""A whole tagger as an ONNX graph: from pixels to probabilities."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from mlssl.atomic import check_free, written_aside
from mlssl.export.onnx import INPUT, check_packages, write_graph
from mlssl.tagging.tagger import Tagger

OUTPUT = "probabilities"

MAX_DIFFERENCE = 1e-4
"""Maximum allowed difference of a probability in onnxruntime."""


def export_tagger(tagger: Tagger, path: str | os.PathLike[str], *, overwrite: bool = False) -> float:
    """Write the tagger as a graph from `images`, uint8 (n, C, H, W) of its size, to `probabilities` (n, L).

    Normalisation, backbone, pooling, classifier and calibration are in the graph. Its metadata has "classes",
    "thresholds" (JSON lists of L) and "size" (height and width, to which images are resized beforehand).

    Args:
        tagger: Tagger to write; it does not change.
        path: File, .onnx.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The largest difference of a probability between onnxruntime and torch, on random images.

    Raises:
        ModuleNotFoundError: If the packages of the extra "onnx" are missing.
        ValueError: If the path has another suffix, or probabilities differ by more than 1e-4.
        FileExistsError: If the file exists and `overwrite` is False.
        OSError: If it cannot be written.
    """
    path = Path(path)
    check_packages()
    if path.suffix != ".onnx":
        raise ValueError(f"{path} does not end in .onnx, the only format of a whole tagger: rename it")
    if not overwrite:
        check_free(path)
    import onnxruntime

    network = tagger.to("cpu").network
    shape = (2, len(network.model.mean), *tagger.size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    header = {
        "classes": json.dumps(tagger.classes),
        "thresholds": json.dumps([round(value, 6) for value in tagger.thresholds.values.tolist()]),
        "size": json.dumps(tagger.size),
    }
    with written_aside(path) as aside, torch.no_grad():
        write_graph(network, aside, header, images, OUTPUT, any_size=False)
        session = onnxruntime.InferenceSession(str(aside), providers=["CPUExecutionProvider"])
        actual = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        difference: float = (actual - network(images)).abs().max().item()
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"The graph's probabilities differ by {difference:.1e}, at most {MAX_DIFFERENCE:.0e} is "
                "allowed, and was not kept: use the tagger itself."
            )
    return difference
