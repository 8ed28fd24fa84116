"""Load checkpoints without running code or downloading."""

from __future__ import annotations

from typing import Any

import lightning as L

from mlssl.module_state import check_received

_class_method: Any = type(vars(L.LightningModule)["load_from_checkpoint"])
"""Class method that, like Lightning's, raises TypeError if called on an instance."""


class SafeLoading(L.LightningModule):
    """A LightningModule whose ``load_from_checkpoint`` checks the file first."""

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
        """Load like Lightning; unless ``weights_only=False``, no code in the file runs and nothing is downloaded.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            ValueError: It is damaged, contains pickled objects, or its hyper-parameters name code or a download.
        """
        weights_only = weights_only is not False
        if weights_only:
            checkpoint_path = check_received(checkpoint_path, hparams_file, kwargs)
        of_lightning = super().load_from_checkpoint
        return of_lightning(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)
