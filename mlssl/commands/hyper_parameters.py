"""Hyper-parameters of an untrusted checkpoint: plain values are used, nothing is imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlssl.received import OWN_INSTANTIATOR, check_names_no_code, leaves_of

CUSTOM = "custom "
"""Prefix of the import path of a custom function, which a checkpoint stores as text."""


def plain_hyper_parameters(hyper_parameters: Mapping[str, Any], kind: type, source: str) -> dict[str, Any]:
    """The plain values among a class's arguments, in a form from which the parser imports nothing.

    Left out are names that are not arguments, values that are not plain (None, bool, int, float, str, and lists and
    dicts of them), functions, which are stored as text "custom my_package.my_function", and text for an argument of a
    type that the parser would make an object of.

    Args:
        hyper_parameters: Hyper-parameters of the checkpoint.
        kind: Class to build.
        source: Their origin, for errors.

    Raises:
        ValueError: If they name code to import.
    """
    values = dict(hyper_parameters)
    if values.get("_instantiator") == OWN_INSTANTIATOR:
        del values["_instantiator"]
    check_names_no_code(values, source)
    types = _argument_types(kind)
    return {
        name: value
        for name, value in values.items()
        if name in types
        and _is_plain(value)
        and not is_custom(value)
        and (not any(isinstance(leaf, str) for leaf in leaves_of(value)) or _keeps_text(types[name]))
    }


def is_custom(value: object) -> bool:
    """Whether the value names a custom function."""
    return isinstance(value, str) and value.startswith(CUSTOM)


def _argument_types(kind: type) -> dict[str, Any]:
    """Name → type of the constructor arguments of a class and its bases; Any without an annotation."""
    types: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        constructor: Any = vars(base).get("__init__")
        if constructor is None or not inspect.isfunction(constructor):
            continue
        try:
            hints = get_type_hints(constructor)
        except NameError:  # imported for a type checker alone
            hints = {}
        types |= {name: hints.get(name, Any) for name in inspect.signature(constructor).parameters}
    return types


def _keeps_text(kind: Any) -> bool:
    """Whether text for an argument of this type stays text: plain types, or a union with str before a class."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for member in members:
        if member in (str, Any) or get_origin(member) is Literal:
            return True
        if member in (bool, int, float, type(None)):
            continue
        inner = [one for one in get_args(member) if one is not Ellipsis]
        if member not in (list, dict, tuple) and not (
            get_origin(member) in (list, dict, tuple) and all(map(_keeps_text, inner))
        ):
            return False
    return True


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
