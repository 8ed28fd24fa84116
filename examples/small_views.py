"""Multi-crop (SwAV, arXiv 2006.09882): small views of the whole image predict the blocks of their image.

python examples/small_views.py fit --data.local_views '{count: 4, size: 32}' --data.dataset folder --data.root photos/
"""

import sys

import torch

from mlssl import MultiLabelSSLModule
from mlssl.cli import main


class SmallViews(MultiLabelSSLModule):
    """The paper's method with a third term, over the local views of a batch (B, V, C, s, s).

    Args:
        local_weight: Weight of the term.
        settings: All others of MultiLabelSSLModule.
    """

    def __init__(self, local_weight: float = 2.0, **settings):
        super().__init__(**settings)
        self.local_weight = local_weight

    def terms(self, embeddings, batch):
        ids, num_local, num_blocks = batch["image_ids"], batch["local_views"].shape[1], batch["views"].shape[2]
        local = self.embed(batch["local_views"].flatten(0, 1))
        blocks = torch.cat([embedding.projections for embedding in embeddings]).detach()
        block_ids = ids.repeat_interleave(num_blocks).repeat(len(embeddings))
        value = self.image_aware(local.predictions, ids.repeat_interleave(num_local), blocks, block_ids)
        return super().terms(embeddings, batch) | {"local": (self.local_weight, value)}


if __name__ == "__main__":
    sys.exit(main(model=SmallViews))
