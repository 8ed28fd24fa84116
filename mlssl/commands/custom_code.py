"""Classes and functions that a user names by import path, on the command line or in a config."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def is_import_path(value: object) -> bool:
    """Whether the value is text such as ``my_package.my_function``."""
    return isinstance(value, str) and _IMPORT_PATH.fullmatch(value) is not None


def make_importable(folder: str | os.PathLike[str] = ".") -> None:
    """Let modules of a folder be imported, as ``python -m`` does for the current one."""
    path = os.path.abspath(folder)  # noqa: PTH100 - links stay as they are
    if path not in (os.path.abspath(entry or ".") for entry in sys.path):  # noqa: PTH100
        sys.path.insert(0, path)


def import_object(path: str, named_by: str) -> Any:
    """Import the object at an import path; modules in the current directory are found.

    Args:
        path: Such as ``my_package.MyModule``.
        named_by: The option or file that names it, for errors.

    Raises:
        ValueError: If `path` is not an import path, or cannot be imported.
    """
    if not is_import_path(path):
        raise ValueError(f"{named_by} names {path!r}: pass an import path, such as my_package.MyName.")
    make_importable()
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{named_by} names {path!r}, which cannot be imported ({error}): run mlssl in the folder that "
            f"contains {module.partition('.')[0]!r}, or install it."
        ) from error


def import_path(kind: type) -> str:
    """The shortest path that imports a class; for a class in a script, the name of the script and of the class."""
    module = kind.__module__
    main = sys.modules["__main__"]
    if module == "__main__":
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:
            return f"{spec.name}.{kind.__qualname__}"
        return f"{Path(file).stem if file else module}.{kind.__qualname__}"
    packages = module.split(".")
    for length in range(1, len(packages)):
        shorter = ".".join(packages[:length])
        if getattr(sys.modules.get(shorter), kind.__qualname__, None) is kind:
            return f"{shorter}.{kind.__qualname__}"
    return f"{module}.{kind.__qualname__}"
