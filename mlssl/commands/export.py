"""`mlssl export`: the backbone of a checkpoint as a file of its own."""

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
    """Write the backbone of a checkpoint alone, and check that it gives the same features after loading.

    Example: mlssl export runs/fit-20250101-120000/checkpoints/last.ckpt -o backbone.safetensors

    Args:
        checkpoint: Written by `mlssl fit`, a file or FSDP's folder of shards; or a tagger, for onnx or
            timm-dir.
        format: timm, timm-dir, torchvision, detectron2, safetensors, onnx or torch.export; by default the first
            that the output's suffix names and that can hold the backbone.
        network: Submodule to write, the backbone or another of its architecture, such as teacher.
        overwrite: Replace existing files.
        image_size: Height and width, or one side, of the images that features are compared on.
        fixed_size: Let a graph, of onnx or torch.export, take images of image_size alone.
        license: Of the weights, by the Hugging Face Hub's identifier, such as cc0-1.0; for header and model card.
        output: File to write, or folder for timm-dir.
    """
    from mlssl.export import export_backbone
    from mlssl.tagging.tagger import Tagger, is_tagger

    if is_tagger(checkpoint):
        from mlssl.tagging.onnx import export_tagger
        from mlssl.tagging.timm_folder import export_timm_classifier

        if format not in (None, "onnx", "timm-dir"):
            raise ValueError(
                f"--format {format} was given, and a tagger is exported as onnx or timm-dir: pass one of them"
            )
        write = export_timm_classifier if format == "timm-dir" else export_tagger
        difference = write(Tagger.load(checkpoint), output, overwrite=overwrite)
        print(f"{output}: a whole tagger, largest difference of a probability {difference:.1e}")
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
    print(f"largest difference of its features: {report.max_difference:.1e} of the largest feature")
