"""Settings of local views: small views of the whole image, as in multi-crop recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mlssl.views.branches import Branch, check_keys, plain_branch, resolve_branch
from mlssl.views.recipe import Recipe

MIN_LOCAL_SIZE = 8
CROP_ASPECT = Recipe().crop_aspect
"""Minimum and maximum width / height of the crop for a branch that does not crop itself."""


@dataclass(frozen=True)
class LocalViews:
    """V small views of the whole image.

    Attributes:
        count: V, at least 1.
        branch: Their augmentation. `area` replaces the crop area of a Recipe; any other branch gets a random crop of
            that area.
        size: Side s in pixels, at least 8.
        area: Minimum and maximum crop, as fractions of the image area.
    """

    count: int
    branch: Branch
    size: int = 96
    area: tuple[float, float] = (0.05, 0.3)


def resolve_local_views(setting: Mapping[str, Any], first_branch: Branch) -> LocalViews:
    """Read the settings `count`, `size`, `area` and `branch`; the default branch is the first one of the blocks.

    Raises:
        ValueError: A key is misspelt, count is missing, or a number is out of range.
        TypeError: The settings are not a mapping, or the branch is not a branch.
    """
    if not isinstance(setting, Mapping):
        raise TypeError(
            f"local_views is of type {type(setting).__name__}: pass a mapping, such as {{'count': 4, 'size': 96}}"
        )
    check_keys(setting, [field.name for field in fields(LocalViews)], "local_views")
    if "count" not in setting:
        raise ValueError("local_views has no count: pass the number of views, such as {'count': 4, 'size': 96}")
    wanted = setting.get("branch")
    branch = first_branch if wanted is None else resolve_branch(wanted, "the branch of local_views")
    given = LocalViews(**{**setting, "branch": branch})
    for name, least in (("count", 1), ("size", MIN_LOCAL_SIZE)):
        value = getattr(given, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"local_views has {name}={value!r}, expected an integer of at least {least}: correct it")
    try:
        area = Recipe(crop_area=given.area).crop_area
    except ValueError as error:
        raise ValueError(f"local_views has a wrong area: {str(error).replace('crop_area', 'area')}") from None
    if isinstance(branch, Recipe):
        branch = replace(branch, crop_area=area)
    return replace(given, branch=branch, area=area)


def plain_local_views(setting: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings as plain values, for hyper-parameters; see `mlssl.views.branches.plain_branch`."""
    if setting is None:
        return None
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in setting.items()}
    if plain.get("branch") is not None:
        plain["branch"] = plain_branch(setting["branch"])
    return plain
