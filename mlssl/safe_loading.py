"""Loading of a checkpoint that runs no code and downloads nothing."""

from __future__ import annotations

from typing import Any

import lightning as L

from mlssl.module_state import check_received

_class_method: Any = type(vars(L.LightningModule)["load_from_checkpoint"])
"""Lightning's kind of class method, which raises TypeError where it is called on an instance."""


class SafeLoading(L.LightningModule):
    """A LightningModule whose ``load_from_checkpoint`` looks at a file before Lightning does."""

    @_class_method  # type: ignore[untyped-decorator]
    def load_from_checkpoint(
        cls,  # noqa: N805 - a class method
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load as Lightning does; unless ``weights_only=False``, nothing in the file runs code or is downloaded.

        Raises:
            FileNotFoundError: If no checkpoint stands there.
            ValueError: If it is damaged, holds pickled objects, or its hyper-parameters name code or a download.
        """
        weights_only = weights_only is not False
        if weights_only:
            checkpoint_path = check_received(checkpoint_path, hparams_file, kwargs)
        of_lightning = super().load_from_checkpoint
        return of_lightning(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)
