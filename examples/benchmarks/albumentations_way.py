"""The method's recipe written with albumentations, as a comparison in speed and looks."""

import os
from typing import Any

from mlssl.views.recipe import REFERENCE_SIZE, Recipe

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks PyPI for a newer version
import albumentations as A


def pipeline(recipe: Recipe, size: int) -> Any:
    """A Compose of a recipe's operations; crops that shrink and blurs below a pixel are those of albumentations."""
    sigma = tuple(value * size / REFERENCE_SIZE for value in recipe.blur_sigma)
    # Half a step below the threshold, because values are compared with fraction · 255 in floating point.
    threshold = (recipe.solarize_threshold - 0.5) / 255
    return A.Compose(
        [
            A.RandomResizedCrop((size, size), scale=recipe.crop_area, ratio=recipe.crop_aspect),
            A.ColorJitter(
                recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=recipe.jitter_probability
            ),
            A.ToGray(p=recipe.gray_probability),
            A.GaussianBlur(blur_limit=0, sigma_limit=sigma, p=recipe.blur_probability),
            A.Solarize((threshold, threshold), p=recipe.solarize_probability),
            A.HorizontalFlip(p=recipe.flip_probability),
        ]
    )
