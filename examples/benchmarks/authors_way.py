"""How the paper's author trains, restated from docs/method.md for the benchmarks: what ours is measured against.

PIL crops and torchvision's first transforms, an image's views as normalised float32 from worker to device, float32
weights in torch's default layout, and the loss on whole R × R matrices. Network, recipe and numbers are ours.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as T

from mlssl.backbones import build_backbone, feature_width
from mlssl.data.records import Records
from mlssl.heads import predictor, projector
from mlssl.views.grid import block_grid
from mlssl.views.recipe import PRESETS, REFERENCE_SIZE, Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GaussianBlur:
    """Pillow's blur with σ uniform in a range, as MoCo v2 and SimSiam have it; faster than torchvision's own."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class Solarize:
    """Invert what reaches the threshold."""

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, self.threshold)


def pil_pipeline(recipe: Recipe, size: int) -> T.Compose:
    """One branch: a PIL image to a normalised float32 view (3, S, S)."""
    low, high = (sigma * size / REFERENCE_SIZE for sigma in recipe.blur_sigma)
    jitter = T.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return T.Compose(
        [
            T.RandomResizedCrop(size, recipe.crop_area, recipe.crop_aspect),
            T.RandomApply([jitter], recipe.jitter_probability),
            T.RandomGrayscale(recipe.gray_probability),
            T.RandomApply([GaussianBlur((low, high))], recipe.blur_probability),
            T.RandomApply([Solarize(recipe.solarize_threshold)], recipe.solarize_probability),
            T.RandomHorizontalFlip(recipe.flip_probability),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


class PilViews(Dataset[tuple[Tensor, int]]):
    """Normalised float32 views (A, K, 3, S, S) and the id of an image."""

    def __init__(self, records: Records, size: int, rows: int = 2, cols: int = 2, overlap: float = 0.2) -> None:
        self.records = records
        self.grid = (rows, cols, overlap)
        self.pipelines = [pil_pipeline(recipe, size) for recipe in PRESETS["paper"]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.records.path(index)).convert("RGB")
        boxes = block_grid(image.height, image.width, *self.grid)
        blocks = [image.crop((b.left, b.top, b.left + b.width, b.top + b.height)) for b in boxes]
        views = [torch.stack([pipeline(block) for block in blocks]) for pipeline in self.pipelines]
        return torch.stack(views), index


class AuthorsNetwork(nn.Module):
    """Backbone, projector and predictor in float32; views (B, A, K, 3, S, S) and ids (B,) to the loss."""

    def __init__(self, backbone: str, projection_dim: int, predictor_dim: int, **backbone_kwargs: Any) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, **backbone_kwargs)
        self.projector = projector(feature_width(self.backbone), projection_dim)
        self.predictor = predictor(projection_dim, predictor_dim)

    def forward(self, views: Tensor, image_ids: Tensor) -> Tensor:
        num_blocks = views.shape[2]
        z = [self.projector(self.backbone(views[:, branch].flatten(0, 1))) for branch in (0, 1)]
        p = [self.predictor(one) for one in z]
        pair = -0.5 * (F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean())
        ids = image_ids.repeat_interleave(num_blocks).repeat(2)
        sets = torch.cat([p[0], z[1]]), torch.cat([p[1], z[0]])
        return pair + 4 * 0.5 * sum(plain_image_aware_loss(features, ids) for features in sets)


def plain_image_aware_loss(features: Tensor, ids: Tensor, temperature: float = 0.3, base: float = 0.07) -> Tensor:
    """The log-of-sum form over features (R, P) on matrices (R, R), written as such losses usually are."""
    features = F.normalize(features, dim=1)
    logits = features @ features.T / temperature
    own = torch.eye(len(features), device=features.device)
    positive = (ids[:, None] == ids[None, :]).to(logits) - own
    exponentials = logits.exp() * (1 - own)
    log_ratio = torch.log(exponentials.sum(1)) - torch.log((exponentials * positive).sum(1))
    return (temperature / base) * (log_ratio / positive.sum(1)).mean()
