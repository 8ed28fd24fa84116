"""Hyper-parameters of a checkpoint that somebody else may have written: plain values are taken, nothing is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

CUSTOM = "custom "
"""Before the import path of a user's function, which a checkpoint keeps as text."""

_OWN_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What LightningCLI itself writes; it is left out, as LightningCLI does when it reads it."""

_NAMES_OF_CODE = ("_instantiator", "_class_path", "class_path")


def plain_hyper_parameters(hyper_parameters: Mapping[str, Any], kind: type, source: str) -> dict[str, Any]:
    """Those of a class's arguments that are plain values, in a form by which the parser imports nothing.

    Left out are names that are no arguments, values that are not plain (None, bool, int, float, str, and lists and
    dicts of them), functions, which are kept as text "custom my_package.my_function", and text for an argument of a
    type that the parser would make an object of.

    Args:
        hyper_parameters: Of the checkpoint.
        kind: Class that is built.
        source: Where they are from, for errors.

    Raises:
        ValueError: If they name code to import.
    """
    values = dict(hyper_parameters)
    if values.get("_instantiator") == _OWN_INSTANTIATOR:
        del values["_instantiator"]
    named = next((key for key in _keys(values) if key in _NAMES_OF_CODE), None)
    if named is not None:
        raise ValueError(
            f"The hyper-parameters of {source} name code to import ({named!r}), which those of mlssl fit never do: "
            "nothing was imported; pass a checkpoint that mlssl fit has written."
        )
    types = _argument_types(kind)
    return {
        name: value
        for name, value in values.items()
        if name in types
        and _is_plain(value)
        and not is_custom(value)
        and (not any(isinstance(leaf, str) for leaf in _leaves(value)) or _keeps_text(types[name]))
    }


def is_custom(value: object) -> bool:
    """Whether it stands for a function of the user's."""
    return isinstance(value, str) and value.startswith(CUSTOM)


def _argument_types(kind: type) -> dict[str, Any]:
    """Name → type of what the constructors of a class and of its bases take; Any where none is said."""
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
    """Whether text for an argument of this type stays text: plain types, or a union that has str before a class."""
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


def _keys(value: object) -> Iterator[object]:
    """Keys of mappings at any depth."""
    if isinstance(value, Mapping):
        yield from value
    for one in _inside(value):
        yield from _keys(one)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (Mapping, list, tuple)):
        for one in _inside(value):
            yield from _leaves(one)
    else:
        yield value


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
