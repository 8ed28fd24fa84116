"""`mlssl export`: the backbone of a checkpoint as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlssl.export import export_backbone


def export(
    checkpoint: Path,
    format: Literal["timm", "torchvision", "safetensors"] | None = None,
    overwrite: bool = False,
    output: Path = Path("backbone.safetensors"),
) -> None:
    """Write the backbone of a checkpoint alone, and check that it gives the same features after loading.

    Example: mlssl export runs/fit-20250101-120000/checkpoints/last.ckpt -o backbone.safetensors

    Args:
        checkpoint: Written by `mlssl fit`.
        format: Of the file; the first that can hold the backbone by default.
        overwrite: Replace an existing file.
        output: File to write.
    """
    report = export_backbone(checkpoint, output, format, overwrite=overwrite)
    print(f"{report.path}: format {report.format}, checked by {report.check}")
    print(f"largest difference of its features: {report.max_difference:.1e} of the largest feature")
