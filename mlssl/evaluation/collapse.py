"""Measures of collapse, their healthy values, and what to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlssl.evaluation.geometry import effective_rank, pair_cosines, spread

MIN_STD, MIN_RANK = 0.2, 2.0
"""Minimum healthy spread (a mean cosine between views of about 0.96) and effective rank."""

REMEDY = "Try stop_gradient=True, a lower base_lr, a larger batch_size or a larger contrastive_weight."

MAX_ROWS = 1024
"""Maximum number of views measured: the singular values of 1024 rows cost less than a step."""


@torch.no_grad()
def collapse_measures(z: Tensor) -> dict[str, Tensor]:
    """Spread, effective rank and mean cosines of the views of a batch.

    - ``std``: standard deviation over the views of each channel of the L2-normalised z, mean over channels, times √P:
      1 if the views are spread evenly over the sphere, 0 if all are one point (SimSiam, arXiv 2011.10566, sec. 4.1).
    - ``rank``: exp of the entropy of the singular values' shares, 1 to min(views, P) (RankMe, arXiv 2210.02885, eq. 1).
    - ``same_block``, ``same_image``, ``other_image``: mean cosines of pairs of views, −1 to 1. Two blocks of one image
      are ``same_image`` in any two branches. A kind without pairs (one block, one image) is left out.

    Args:
        z: (B, A, K, P), finite; only the first 1024 // (A·K) images are used, but at least two.

    Returns:
        Scalars by name.

    Example:
        >>> {name: round(value.item(), 3) for name, value in collapse_measures(torch.ones(2, 2, 2, 8)).items()}
        {'std': 0.0, 'rank': 1.0, 'same_block': 1.0, 'same_image': 1.0, 'other_image': 1.0}
    """
    branches, blocks = z.shape[1:3]
    z = z[: max(2, MAX_ROWS // (branches * blocks))]
    rows = F.normalize(z.float().flatten(0, 2), dim=1)
    measures = {"std": spread(rows), "rank": effective_rank(torch.linalg.svdvals(rows))}
    return measures | {name: cosines.mean() for name, cosines in pair_cosines(z).items()}
