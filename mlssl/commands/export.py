"""`mlssl export`: the backbone of a checkpoint in a separate file."""

from __future__ import annotations

from pathlib import Path


def export(
    checkpoint: Path,
    format: str | None = None,
    network: str = "backbone",
    overwrite: bool = False,
    image_size: int | tuple[int, int] | None = None,
    fixed_size: bool = False,
    license: str | None = None,
    output: Path = Path("backbone.safetensors"),
) -> None:
    """Write only the backbone of a checkpoint, reload it, and check that it gives the same features.

    Example: mlssl export runs/fit-20250101-120000/checkpoints/last.ckpt -o backbone.safetensors

    Args:
        checkpoint: File or folder of FSDP shards written by `mlssl fit`; or a tagger, for onnx or timm-dir.
        format: timm, timm-dir, torchvision, detectron2, safetensors, onnx or torch.export; by default the first
            that matches the output's suffix and supports the backbone.
        network: Submodule to write, the backbone or another of its architecture, such as teacher.
        overwrite: Replace existing files.
        image_size: Height and width, or one side, of the images on which features are compared.
        fixed_size: Fix the input size of an onnx or torch.export graph to image_size.
        license: License of the weights, by its Hugging Face identifier such as cc0-1.0; for header and model card.
        output: File to write, or folder for timm-dir.
    """
    from mlssl.export import export_backbone
    from mlssl.tagging.tagger import Tagger, is_tagger

    if is_tagger(checkpoint):
        from mlssl.tagging.onnx import export_tagger
        from mlssl.tagging.timm_folder import export_timm_classifier

        if format not in (None, "onnx", "timm-dir"):
            raise ValueError(
                f"--format {format} was given, but a tagger is exported as onnx or timm-dir: pass one of them"
            )
        write = export_timm_classifier if format == "timm-dir" else export_tagger
        difference = write(Tagger.load(checkpoint), output, overwrite=overwrite)
        print(f"{output}: the whole tagger, largest difference in a probability {difference:.1e}")
        return
    metadata = {} if license is None else {"license": license}
    report = export_backbone(
        checkpoint,
        output,
        format,
        network,
        overwrite=overwrite,
        metadata=metadata,
        image_size=image_size,
        fixed_size=fixed_size,
    )
    print(f"{report.path}: format {report.format}, checked by {report.check}")
    print(f"largest difference in a feature: {report.max_difference:.1e}, relative to the largest feature")
