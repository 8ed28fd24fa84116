"""Self-supervised contrastive pre-training on multi-label images, as a PyTorch Lightning module library.

Importing it loads nothing: a name is loaded when it is used, so that code without torch does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlssl.data.datamodule import MultiLabelDataModule as MultiLabelDataModule
    from mlssl.data.records import Records as Records
    from mlssl.evaluation.features import Features as Features
    from mlssl.evaluation.features import extract_features as extract_features
    from mlssl.evaluation.probe import linear_probe as linear_probe
    from mlssl.export import export_backbone as export_backbone
    from mlssl.losses import ImageAwareContrastiveLoss as ImageAwareContrastiveLoss
    from mlssl.losses import NegativeCosineSimilarity as NegativeCosineSimilarity
    from mlssl.losses import image_aware_contrastive_loss as image_aware_contrastive_loss
    from mlssl.losses import negative_cosine_similarity as negative_cosine_similarity
    from mlssl.module import MultiLabelSSLModule as MultiLabelSSLModule
    from mlssl.recipes import recipe as recipe
    from mlssl.tagging.tagger import Tagger as Tagger
    from mlssl.views.blocks import BlockViews as BlockViews
    from mlssl.views.grid import block_grid as block_grid
    from mlssl.views.recipe import Recipe as Recipe

__version__ = "0.1.0"

_MODULES = {
    "BlockViews": "mlssl.views.blocks",
    "Features": "mlssl.evaluation.features",
    "ImageAwareContrastiveLoss": "mlssl.losses",
    "MultiLabelDataModule": "mlssl.data.datamodule",
    "MultiLabelSSLModule": "mlssl.module",
    "NegativeCosineSimilarity": "mlssl.losses",
    "Recipe": "mlssl.views.recipe",
    "Records": "mlssl.data.records",
    "Tagger": "mlssl.tagging.tagger",
    "block_grid": "mlssl.views.grid",
    "export_backbone": "mlssl.export",
    "extract_features": "mlssl.evaluation.features",
    "image_aware_contrastive_loss": "mlssl.losses",
    "linear_probe": "mlssl.evaluation.probe",
    "negative_cosine_similarity": "mlssl.losses",
    "recipe": "mlssl.recipes",
}
"""Public name → module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mlssl' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
