"""The peers of a recipe: their losses, heads and updates are lightly's (extra `bench`), their views and loader ours."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.nn import functional as F

from mlssl import MultiLabelSSLModule, Recipe
from mlssl.backbones import feature_width

FULL, SMALL = 2, 6
"""Views of the whole image, and small ones of multi-crop (SwAV, arXiv 2006.09882)."""

_PLAIN = Recipe(solarize_probability=0.0)
_BYOL = replace(_PLAIN, crop_area=(0.08, 1.0), saturation=0.2)
COLOURS = {
    "simclr": [replace(_PLAIN, crop_area=(0.08, 1.0), blur_probability=0.0)] * 2,  # arXiv 2002.05709, B.9 (CIFAR)
    "mocov2": [_PLAIN] * 2,  # arXiv 2003.04297
    "simsiam": [replace(_PLAIN, blur_probability=0.0)] * 2,  # arXiv 2011.10566, D (CIFAR)
    "byol": [replace(_BYOL, blur_probability=1.0), replace(_BYOL, blur_probability=0.1, solarize_probability=0.2)],
    "vicreg": [replace(_BYOL, solarize_probability=0.1)] * 2,  # arXiv 2105.04906, C.1
    "swav": [replace(_PLAIN, crop_area=(0.14, 1.0))] * 2,  # arXiv 2006.09882, colours of half the strength
}
COLOURS["barlow"] = COLOURS["byol"]  # arXiv 2103.03230, 2.2
COLOURS["dino"] = [replace(one, crop_area=(0.14, 1.0)) for one in COLOURS["byol"]]  # its README, convolutional networks
"""Branches as the authors have them, for small images where they say so."""

LOCAL_AREA = {"own": [0.05, 0.14], "soft": [0.05, 0.35]}
"""Area of the small views: as both authors have it, and the complement of wider crops for our colours."""

LOCAL_VIEWS: dict[str, Any] = {"count": SMALL, "size": 40}
MULTI_CROP = frozenset({"swav", "dino"})


class Peer(MultiLabelSSLModule):
    """Two branches of the whole image; a subclass sets its heads and its criterion in `build`.

    Args:
        settings: Of MultiLabelSSLModule.
    """

    has_teacher = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.predictor = nn.Identity()
        self.build(feature_width(self.backbone))
        if self.has_teacher:
            student = self.projector
            self.build(feature_width(self.backbone))  # DINO's head cannot be copied
            self.projector.load_state_dict(student.state_dict())
            self.teacher = nn.Sequential(deepcopy(self.backbone), self.projector).requires_grad_(False)
            self.projector = student

    def build(self, width: int) -> None:
        raise NotImplementedError

    def terms(self, embeddings, batch):
        """The criterion of both branches' projections, as most have it."""
        return {"loss": (1.0, self.criterion(*(one.projections for one in embeddings)))}

    def crossed(self, own, aims):
        """The criterion of each branch with the other one's aim, as a term."""
        return {"loss": (0.5, self.criterion(own[0], aims[1]) + self.criterion(own[1], aims[0]))}

    @torch.no_grad()
    def taught(self, batch):
        """What the average of earlier weights gives for each branch."""
        return [self.teacher(self.normalize(views.flatten(0, 1))) for views in batch["views"].unbind(1)]

    def small(self, batch):
        """Projections of each small view."""
        views = batch["local_views"]
        return self.embed(views.flatten(0, 1)).projections.unflatten(0, views.shape[:2]).unbind(1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.has_teacher:
            momentum = cosine_schedule(self.global_step, max(self.trainer.max_steps, self.global_step + 1), 0.99, 1.0)
            update_momentum(nn.Sequential(self.backbone, self.projector), self.teacher, momentum)


class SimCLR(Peer):
    """arXiv 2002.05709."""

    def build(self, width):
        self.projector = SimCLRProjectionHead(width, width, 128)
        self.criterion = NTXentLoss(temperature=0.5)


class MoCo(Peer):
    """MoCo v2, arXiv 2003.04297, with both branches as queries."""

    has_teacher = True

    def build(self, width):
        self.projector = MoCoProjectionHead(width, width, 128)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(1024, 128))  # less than an epoch of small sets

    def terms(self, embeddings, batch):
        return self.crossed([one.projections for one in embeddings], self.taught(batch))


class SimSiam(Peer):
    """arXiv 2011.10566."""

    def build(self, width):
        self.projector = SimSiamProjectionHead(width, 2048, 2048)
        self.predictor = SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def terms(self, embeddings, batch):
        return self.crossed([one.predictions for one in embeddings], [one.projections.detach() for one in embeddings])


class BYOL(Peer):
    """arXiv 2006.07733."""

    has_teacher = True

    def build(self, width):
        self.projector = BYOLProjectionHead(width, 4096, 256)
        self.predictor = BYOLPredictionHead(256, 4096, 256)
        self.criterion = NegativeCosineSimilarity()

    def terms(self, embeddings, batch):
        return self.crossed([one.predictions for one in embeddings], self.taught(batch))


class Barlow(Peer):
    """Barlow Twins, arXiv 2103.03230."""

    def build(self, width):
        self.projector = BarlowTwinsProjectionHead(width, 2048, 2048)
        self.criterion = BarlowTwinsLoss()


class VICReg(Peer):
    """arXiv 2105.04906."""

    def build(self, width):
        self.projector = VICRegProjectionHead(width, 2048, 2048)
        self.criterion = VICRegLoss()


class DINO(Peer):
    """arXiv 2104.14294, with multi-crop."""

    has_teacher = True

    def build(self, width):
        self.projector = DINOProjectionHead(width, 2048, 256, 2048, freeze_last_layer=1)
        self.criterion = DINOLoss(output_dim=2048)

    def terms(self, embeddings, batch):
        student = [one.projections for one in embeddings] + list(self.small(batch))
        return {"dino": (1.0, self.criterion(self.taught(batch), student))}

    def on_after_backward(self):
        self.projector.cancel_last_layer_gradients(self.current_epoch)


class SwAV(Peer):
    """arXiv 2006.09882, with multi-crop."""

    def build(self, width):
        self.projector = SwaVProjectionHead(width, 2048, 128)
        self.prototypes = SwaVPrototypes(128, 300, n_steps_frozen_prototypes=20)
        self.criterion = SwaVLoss()

    def terms(self, embeddings, batch):
        self.prototypes.normalize()
        whole = [one.projections for one in embeddings]
        high, low = (
            [self.prototypes(F.normalize(z, dim=1), self.global_step) for z in views]
            for views in (whole, self.small(batch))
        )
        return {"swav": (1.0, self.criterion(high, low).squeeze())}


PEERS = {
    "simclr": SimCLR,
    "mocov2": MoCo,
    "simsiam": SimSiam,
    "byol": BYOL,
    "barlow": Barlow,
    "vicreg": VICReg,
    "dino": DINO,
    "swav": SwAV,
}
