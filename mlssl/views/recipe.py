"""The numbers of an augmentation branch, and named presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

REFERENCE_SIZE = 224
"""Side of a view in pixels for which `Recipe.blur_sigma` is defined."""

_RANGES: dict[str, tuple[float, float]] = {
    "crop_area": (0.001, 1),
    "crop_aspect": (0.01, 100),
    "jitter_probability": (0, 1),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "gray_probability": (0, 1),
    "blur_probability": (0, 1),
    "blur_sigma": (0, REFERENCE_SIZE),
    "solarize_probability": (0, 1),
    "solarize_threshold": (1, 255),
    "flip_probability": (0, 1),
    "vertical_flip_probability": (0, 1),
    "turn_probability": (0, 1),
    "noise_probability": (0, 1),
    "noise_std": (0, 1),
    "erase_probability": (0, 1),
    "erase_area": (0.001, 1),
    "erase_aspect": (0.01, 100),
}
"""Minimum and maximum of each number."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of one branch; the defaults are those of branch 0 of the paper (arXiv 2506.23156).

    The operations run in this order: crop, colour jitter, gray, blur, solarize, noise, erasing, flips, turn. The
    numbers shared by both branches of the paper come from SimSiam (arXiv 2011.10566, appendix A), the threshold from
    BYOL (arXiv 2006.07733, appendix B). The paper does not use vertical flip, turn, noise or erasing.

    Attributes:
        crop_area: Minimum and maximum crop, as fractions of the block area, 0.001 to 1.
        crop_aspect: Minimum and maximum width / height of a crop, sampled log-uniformly, 0.01 to 100.
        jitter_probability: Probability of the four jitters together, 0 to 1; their order is random.
        brightness: The factor is uniform in 1 ± brightness, 0 to 1.
        contrast: The factor is uniform in 1 ± contrast, 0 to 1.
        saturation: The factor is uniform in 1 ± saturation, 0 to 1.
        hue: The shift is uniform in ± hue, in turns of the colour circle, 0 to 0.5.
        gray_probability: Probability of gray, 0 to 1.
        blur_probability: Probability of Gaussian blur, 0 to 1.
        blur_sigma: Minimum and maximum σ, 0 to 224, in pixels for a view of 224; scales with the side of the view.
        solarize_probability: Probability of solarizing, 0 to 1.
        solarize_threshold: Values of at least this are inverted, 1 to 255.
        flip_probability: Probability of a horizontal flip, 0 to 1.
        vertical_flip_probability: Probability of a vertical flip, 0 to 1.
        turn_probability: Probability of a rotation by 90°, 180° or 270°, equally likely, 0 to 1; with 0.75 all four
            orientations are equally likely.
        noise_probability: Probability of Gaussian noise, independent per pixel and channel, 0 to 1.
        noise_std: Minimum and maximum standard deviation of the noise, as fractions of 255, 0 to 1. The default maximum
            is that of torchvision's `GaussianNoise`.
        erase_probability: Probability of random erasing (arXiv 1708.04896), 0 to 1: fills a rectangle with uniform
            random values, the paper's RE-R.
        erase_area: Minimum and maximum rectangle, as fractions of the view area, 0.001 to 1; torchvision's default.
        erase_aspect: Minimum and maximum width / height of the rectangle, 0.01 to 100; torchvision's default.

    Raises:
        ValueError: A number is out of range, or a minimum is above its maximum.
    """

    crop_area: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.5
    solarize_threshold: int = 128
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    turn_probability: float = 0.0
    noise_probability: float = 0.0
    noise_std: tuple[float, float] = (0.0, 0.1)
    erase_probability: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.33)
    erase_aspect: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        for field in fields(self):
            given, (least, greatest) = getattr(self, field.name), _RANGES[field.name]
            pair = isinstance(field.default, tuple)
            if not _is_within(given, least, greatest, pair):
                expected = "two numbers, the smaller first, each" if pair else "a number"
                raise ValueError(f"got {field.name}={given}, expected {expected} from {least} to {greatest}")
            if pair:
                object.__setattr__(self, field.name, tuple(given))  # YAML gives a list


def _is_within(given: object, least: float, greatest: float, pair: bool) -> bool:
    if pair != isinstance(given, (tuple, list)):
        return False
    values = given if isinstance(given, (tuple, list)) else (given, given)
    if len(values) != 2 or not all(isinstance(value, (int, float)) for value in values):
        return False
    return bool(least <= values[0] <= values[1] <= greatest)


_PAPER = (Recipe(), Recipe(blur_probability=0.1, solarize_probability=0.2))
_SOFT = tuple(replace(one, solarize_probability=0.0, hue=0.05, gray_probability=0.1) for one in _PAPER)

PRESETS: dict[str, tuple[Recipe, ...]] = {
    "paper": _PAPER,
    "soft": _SOFT,
    "gray": tuple(
        replace(one, saturation=0.0, hue=0.0, gray_probability=0.0, solarize_probability=0.0) for one in _PAPER
    ),
    "overhead": tuple(replace(one, vertical_flip_probability=0.5, turn_probability=0.75) for one in _SOFT),
}
"""Branches by name: `paper`; `soft`, for images whose colours matter; `gray`, for X-ray or infrared, whose values are
not colours; `overhead`, for aerial images and microscopy, which have no upright orientation."""
