"""Geometry of features: cosines by kind of pair, effective rank, spectrum and a map in two dimensions."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_cosines(z: Tensor) -> dict[str, Tensor]:
    """Cosines of all pairs of views of a batch, by what the two views share.

    - ``same_block``: two branches of one block;
    - ``same_image``: two blocks of one image, in any two branches;
    - ``other_image``: views of two images.

    Args:
        z: (B, A, K, P), finite.

    Returns:
        Cosines (pairs,), each pair in both orders, by kind; a kind without pairs (one block, one image) is left out.

    Example:
        >>> {kind: len(cosines) for kind, cosines in pair_cosines(torch.randn(3, 2, 4, 8)).items()}
        {'same_block': 24, 'same_image': 144, 'other_image': 384}
    """
    rows = F.normalize(z.float().flatten(0, 2), dim=1)
    # Rounding may exceed 1. Pairs are selected by index, because a mask would synchronise with the device.
    cosines = (rows @ rows.T).clamp(-1, 1).view(*z.shape[:3], *z.shape[:3])
    same_image = cosines.diagonal(dim1=0, dim2=3)  # (A, K, A, K, B)
    pairs = {
        "same_block": _off_diagonal(same_image.diagonal(dim1=1, dim2=3)),
        "same_image": _off_diagonal(same_image.movedim((1, 3), (0, 1))),
        "other_image": _off_diagonal(cosines.movedim(3, 1)),
    }
    return {name: cosines.flatten() for name, cosines in pairs.items() if cosines.numel()}


def _off_diagonal(pairs: Tensor) -> Tensor:
    """Entries (n · (n − 1), …) of (n, n, …) outside the diagonal."""
    n = len(pairs)
    return pairs.flatten(0, 1)[1:].reshape(n - 1, n + 1, *pairs.shape[2:])[:, :-1].flatten(0, 1)


def spread(z: Tensor) -> Tensor:
    """Standard deviation over the views of each channel of the L2-normalised z, mean over channels, times √P.

    Args:
        z: (n, P), finite.

    Returns:
        Scalar: 1 if the views are spread evenly over the sphere, 0 if all are one point (SimSiam, arXiv 2011.10566,
        sec. 4.1).
    """
    deviation: Tensor = F.normalize(z.float(), dim=1).std(0, correction=0)
    scaled: Tensor = deviation.mean() * z.shape[1] ** 0.5
    return scaled


def effective_rank(singular_values: Tensor) -> Tensor:
    """Exp of the entropy of the singular values' shares (RankMe, arXiv 2210.02885, eq. 1).

    Args:
        singular_values: (r,), at least 0.

    Returns:
        Scalar, 1 (one direction, or all values 0) to r (all equal).

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0])).item()
        2.0
    """
    shares = singular_values / singular_values.sum().clamp(min=torch.finfo(singular_values.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def feature_spectrum(features: Tensor) -> Tensor:
    """Singular values of the features minus their mean, largest first.

    Args:
        features: (n, D), finite, n at least 1.

    Returns:
        (min(n, D),).
    """
    centred = features.float() - features.float().mean(0)
    values: Tensor = torch.linalg.svdvals(centred)
    return values


def directions_of_variance(singular_values: Tensor, share: float = 0.9) -> int:
    """Number of directions, largest first, that explain a fraction of the variance.

    Args:
        singular_values: (r,) of centred features, largest first.
        share: 0–1.

    Example:
        >>> directions_of_variance(torch.tensor([3.0, 1.0, 0.0]), 0.9), directions_of_variance(torch.zeros(3))
        (1, 1)
    """
    variance = singular_values.double().square()
    enough = variance.cumsum(0) >= share * variance.sum()
    return int(enough.int().argmax()) + 1


def map_2d(features: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Coordinates of images on their two principal directions, with feature vectors scaled to unit norm.

    Principal component analysis preserves distances as well as two numbers can and has no setting to tune. The sign of
    a direction is chosen so that its largest coordinate is positive, so that maps are reproducible.

    Args:
        features: (n, D), finite, n at least 1.

    Returns:
        Coordinates (n, 2), and the fraction of the variance (0–1) along each of the two; 0 without variance.
    """
    rows = F.normalize(features.float(), dim=1)
    rows = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    coordinates = torch.zeros(len(rows), 2)
    shares = [0.0, 0.0]
    total = s.square().sum()
    for axis in range(min(2, len(s))):
        along = u[:, axis] * s[axis]
        coordinates[:, axis] = along * (-1 if along[along.abs().argmax()] < 0 else 1)
        shares[axis] = (s[axis].square() / total).item() if total > 0 else 0.0
    return coordinates, (shares[0], shares[1])


def neighbor_map(features: Tensor, seed: int = 0) -> tuple[Tensor, float, float] | None:
    """Coordinates of images by t-SNE (L. van der Maaten and G. Hinton, JMLR 9, 2008), if neighbours are kept better.

    Features are scaled to unit norm, so that its distances follow cosines. It starts from the two principal
    directions.

    Args:
        features: (n, D), finite.
        seed: Seed of scikit-learn's t-SNE.

    Returns:
        Coordinates (n, 2), and how well t-SNE and the principal directions preserve each image's five nearest
        neighbours (`sklearn.manifold.trustworthiness`, 0.5 by chance to 1); None without scikit-learn, with fewer than
        20 images, and if t-SNE is not better.
    """
    if len(features) < 20 or find_spec("sklearn") is None:
        return None
    from sklearn.manifold import TSNE, trustworthiness

    rows = F.normalize(features.float(), dim=1).numpy()
    perplexity = min(30.0, (len(rows) - 1) / 4)
    coordinates = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    of_tsne, of_pca = (float(trustworthiness(rows, one)) for one in (coordinates, map_2d(features)[0].numpy()))
    return (torch.from_numpy(coordinates), of_tsne, of_pca) if of_tsne > of_pca else None
