"""Self-supervised contrastive pre-training on multi-label images, as a PyTorch Lightning module library."""

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
from mlssl.views.blocks import BlockViews as BlockViews
from mlssl.views.grid import block_grid as block_grid

__version__ = "0.1.0"
