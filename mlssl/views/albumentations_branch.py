"""Albumentations pipelines as branches; the only file that imports albumentations."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import numpy.typing as npt


class AlbumentationsBranch:
    """Call a pipeline on a block, seeded per view from the view's generator.

    A pipeline may end in `ToTensorV2`.

    Args:
        pipeline: A Compose or a single transform, for images only.
        name: Its name in errors.

    Raises:
        ValueError: The pipeline has processors or steps for boxes, keypoints, masks or other inputs.
    """

    def __init__(self, pipeline: Any, name: str) -> None:
        if not hasattr(pipeline, "transforms"):
            pipeline = _albumentations().Compose([pipeline])
        others = [*getattr(pipeline, "processors", {}), *getattr(pipeline, "additional_targets", {})]
        others += [wanted for step in _steps(pipeline) for wanted in step.targets_as_params]
        if others:
            raise ValueError(
                f"{name} is an albumentations pipeline with steps for {', '.join(sorted(set(others)))}, and a branch "
                "only has images: leave these steps out"
            )
        self.pipeline = pipeline

    def __call__(self, block: npt.NDArray[np.uint8], generator: np.random.Generator) -> Any:
        """Return the view (C, S, S) of a block (H, W, C)."""
        self.pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        pixels = self.pipeline(image=block)["image"]
        if not isinstance(pixels, np.ndarray):  # a tensor is (C, S, S) already
            return pixels
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_pipeline(path: str, name: str) -> AlbumentationsBranch:
    """Read a pipeline written by `albumentations.save(pipeline, path, data_format="yaml")`.

    Raises:
        ValueError: The file cannot be read, is not a pipeline, or its pipeline is not for images only.
    """
    try:
        pipeline = _albumentations().load(path, data_format="yaml")
    except Exception as error:  # albumentations raises almost anything for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name} is {path!r}, which cannot be read as an albumentations pipeline ({reason}): write it with "
            "albumentations.save(pipeline, path, data_format='yaml')"
        ) from error
    return AlbumentationsBranch(pipeline, name)


def _steps(pipeline: Any) -> list[Any]:
    """Transforms, including those inside OneOf and similar."""
    if not hasattr(pipeline, "transforms"):
        return [pipeline]
    return [step for part in pipeline.transforms for step in _steps(part)]


def _albumentations() -> Any:
    # Without this variable, importing albumentations 2.0.8 asks PyPI for a newer version.
    variable = "NO_ALBUMENTATIONS_UPDATE"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import albumentations
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    return albumentations
