"""What a view looks like: the two augmentation recipes of the method, and as pipelines of albumentations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlssl.views.blurring import gaussian_kernel
from mlssl.views.resizing import resized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from albumentations import Compose

MIN_SIZE = 16
REFERENCE_SIZE = 224
"""Side of a view at which `Recipe.blur_sigma` is meant."""

_RANGES: dict[str, tuple[float, float]] = {
    "blur_probability": (0, 1),
    "solarize_probability": (0, 1),
    "crop_area": (0.001, 1),
    "crop_aspect": (0.01, 100),
    "jitter_probability": (0, 1),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "gray_probability": (0, 1),
    "blur_sigma": (0, REFERENCE_SIZE),
    "solarize_threshold": (1, 255),
    "flip_probability": (0, 1),
}
"""Least and most of a recipe's numbers."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of one branch; the defaults are those that both branches share.

    The branches are those of arXiv 2506.23156; the shared numbers are SimSiam's (arXiv 2011.10566, appendix A) and the
    threshold is BYOL's (arXiv 2006.07733, appendix B).

    Attributes:
        blur_probability: Of the Gaussian blur, 0 to 1.
        solarize_probability: 0 to 1.
        crop_area: Smallest and largest crop, as fractions of the block's area, 0.001 to 1.
        crop_aspect: Smallest and largest width / height of a crop, drawn log-uniformly, 0.01 to 100.
        jitter_probability: Of the four jitters together, 0 to 1; their order is random.
        brightness: The factor is uniform in 1 ± brightness, 0 to 1.
        contrast: The factor is uniform in 1 ± contrast, 0 to 1.
        saturation: The factor is uniform in 1 ± saturation, 0 to 1.
        hue: The shift is uniform in ± hue, in turns of the colour circle, 0 to 0.5.
        gray_probability: 0 to 1.
        blur_sigma: Smallest and largest σ, 0 to 224, in pixels of a view of 224; scaled with the side of the view.
        solarize_threshold: Values of at least this are inverted, 1 to 255.
        flip_probability: Of the horizontal flip, 0 to 1.

    Raises:
        ValueError: If a number is outside its range, or the smallest of two is above the largest.
    """

    blur_probability: float
    solarize_probability: float
    crop_area: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_threshold: int = 128
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            given = getattr(self, name)
            pair = not isinstance(given, (int, float))
            low, high = given if pair else (given, given)
            if not least <= low <= high <= most:
                expected = "two numbers, the smaller first, each" if pair else "a number"
                raise ValueError(f"got {name}={given}, expected {expected} from {least} to {most}")


BRANCH_RECIPES = (
    Recipe(blur_probability=0.5, solarize_probability=0.5),
    Recipe(blur_probability=0.1, solarize_probability=0.2),
)


def branch_recipe(
    branch: int, size: int = 224, recipes: Sequence[Recipe] = BRANCH_RECIPES, channels: int = 3
) -> Compose:
    """Build the pipeline of one branch: crop, jitter, gray, blur, solarize, flip; nothing is normalised.

    For data sets and pipelines of one's own, to which steps can be added. `BlockViews` makes views of the same
    distribution somewhat faster without it.

    The pipeline is called as `pipeline(image=block)["image"]` with uint8 (H, W, C) of any size and gives uint8
    (S, S, C). Its draws come from `pipeline.set_random_state(numpy_generator, python_random)`; until that is called
    they are unseeded. The first call in a process imports albumentations, which takes seconds.

    Deviations from the paper's operations: a crop that shrinks more than twofold is averaged over areas rather than
    interpolated between four pixels, and hue moves in the 2° steps of 8-bit HSV.

    Colours exist for three channels alone, taken as RGB. For any other number, saturation, hue and gray are left out,
    and contrast is taken about each channel's own mean; all other steps are the same, for all channels at once.

    Args:
        branch: Index into `recipes`, from 0.
        size: Side S of a view in pixels, at least 16.
        recipes: One recipe a branch.
        channels: C, at least 1.

    Raises:
        ValueError: If there is no such branch, the size is below 16 or the number of channels below 1.
    """
    if not 0 <= branch < len(recipes):
        raise ValueError(
            f"got branch={branch}, expected one of the {len(recipes)} recipes: pass branch=0 to {len(recipes) - 1}"
        )
    check_size(size)
    check_channels(channels)
    return _pipeline(recipes[branch], size, channels)


def check_size(size: int) -> None:
    """Raise ValueError if views of this side, in pixels, are too small to show anything."""
    if size < MIN_SIZE:
        raise ValueError(
            f"got size={size}, expected views of at least {MIN_SIZE} × {MIN_SIZE} pixels: "
            "pass size=224, or size=64 for small images"
        )


def check_channels(channels: int) -> None:
    """Raise ValueError if an image cannot have so many channels."""
    if channels < 1:
        raise ValueError(
            f"got channels={channels}, expected at least 1: pass channels=3 for RGB or channels=1 for gray"
        )


def _pipeline(recipe: Recipe, size: int, channels: int) -> Compose:
    A = _albumentations()  # noqa: N806
    sigma_min, sigma_max = (sigma * size / REFERENCE_SIZE for sigma in recipe.blur_sigma)
    # Half a step below the threshold, because values are compared with fraction · 255 in floating point.
    solarize_fraction = (recipe.solarize_threshold - 0.5) / 255
    return A.Compose(
        [
            _crop_class(A)((size, size), scale=recipe.crop_area, ratio=recipe.crop_aspect),
            *_colour_steps(A, recipe, channels),
            _blur_class(A)(sigma_limit=(sigma_min, sigma_max), p=recipe.blur_probability),
            A.Solarize((solarize_fraction, solarize_fraction), p=recipe.solarize_probability),
            A.HorizontalFlip(p=recipe.flip_probability),
        ]
    )


def _crop_class(A: Any) -> Any:  # noqa: N803
    class RandomResizedCrop(A.RandomResizedCrop):  # type: ignore[misc]
        """albumentations' draws, applied without a copy of the block and as Pillow resizes."""

        def apply_with_params(self, params: dict[str, Any], *_: Any, **data: Any) -> dict[str, Any]:
            left, top, right, bottom = params["crop_coords"]
            return {**data, "image": resized(data["image"][top:bottom, left:right], *self.size)}

    return RandomResizedCrop


def _blur_class(A: Any) -> Any:  # noqa: N803
    class GaussianBlur(A.GaussianBlur):  # type: ignore[misc]
        """albumentations' blur with a kernel that has the drawn σ also below a pixel."""

        def get_params_dependent_on_data(self, *_: Any, **__: Any) -> dict[str, Any]:
            return {"kernel": gaussian_kernel(self.py_random.uniform(*self.sigma_limit)).astype(np.float32)}

    return GaussianBlur


def _colour_steps(A: Any, recipe: Recipe, channels: int) -> list[Any]:  # noqa: N803
    if channels != 3:
        return [_channel_jitter_class(A)(recipe.brightness, recipe.contrast, p=recipe.jitter_probability)]
    jitter = A.ColorJitter(
        brightness=recipe.brightness,
        contrast=recipe.contrast,
        saturation=recipe.saturation,
        hue=recipe.hue,
        p=recipe.jitter_probability,
    )
    return [jitter, A.ToGray(p=recipe.gray_probability)]


def _channel_jitter_class(A: Any) -> Any:  # noqa: N803
    class ChannelJitter(A.ImageOnlyTransform):  # type: ignore[misc]
        """Brightness and contrast in random order, one factor for all channels, contrast about each one's mean."""

        def __init__(self, brightness: float, contrast: float, p: float) -> None:
            super().__init__(p=p)
            self.brightness = brightness
            self.contrast = contrast

        def get_params(self) -> dict[str, Any]:
            factors = {
                "brightness_factor": self.py_random.uniform(1 - self.brightness, 1 + self.brightness),
                "contrast_factor": self.py_random.uniform(1 - self.contrast, 1 + self.contrast),
            }
            return {**factors, "contrast_first": self.py_random.random() < 0.5}

        def apply(
            self,
            img: np.ndarray,
            brightness_factor: float,
            contrast_factor: float,
            contrast_first: bool,
            **_: Any,
        ) -> np.ndarray:
            pixels = img.astype(np.float32)
            for about_mean in (contrast_first, not contrast_first):
                if about_mean:
                    mean = pixels.mean(axis=(0, 1))
                    pixels = (pixels - mean) * contrast_factor + mean
                else:
                    pixels = pixels * brightness_factor
                pixels = pixels.clip(0, 255)
            return np.rint(pixels).astype(np.uint8)

    return ChannelJitter


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
