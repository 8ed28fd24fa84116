"""Weights of a sharded checkpoint of `torch.distributed.checkpoint`, opened without running code."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARDS = ".metadata"
"""File in a `torch.distributed.checkpoint` folder that lists its tensors."""

_WEIGHTS = ("model.", "state_dict.")
"""Prefixes of weight names in shards: from FSDP's strategy and from ModelParallel's."""


def sharded_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name of a sharded FSDP checkpoint.

    Raises:
        ValueError: It is not a sharded checkpoint, is damaged or contains pickled code.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with (path / SHARDS).open("rb") as file:
            tensors = _HarmlessUnpickler(file).load().state_dict_metadata
        wanted = {name: one for name, one in tensors.items() if name.startswith(_WEIGHTS) and hasattr(one, "size")}
        state = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in wanted.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(state, checkpoint_id=path, no_dist=True)
    except OSError:
        raise
    except Exception as error:  # as for a file
        raise ValueError(f"{path} is not a sharded checkpoint or is damaged: {error}.") from None
    return {name.partition(".")[2]: value for name, value in state.items()}


class _HarmlessUnpickler(pickle.Unpickler):
    """Reads names, shapes and locations of tensors, and refuses all other calls in a pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _HARMLESS_MODULES and "." not in name:
            found = super().find_class(module, name)
            of_metadata = module == _METADATA_MODULE and isinstance(found, type)
            if of_metadata or isinstance(found, torch.dtype) or (module, name) in _HARMLESS:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in a list of weights")


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("collections", "OrderedDict"),
}
_HARMLESS_MODULES = {_METADATA_MODULE, *(module for module, _ in _HARMLESS)}
