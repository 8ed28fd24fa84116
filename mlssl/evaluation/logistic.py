"""Logistic regression for many labels and strengths at once, on features that may exceed memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mlssl.choices import PositiveWeight

IN_MEMORY_BYTES = 2**30
"""Features that need more than this in float32 are read again in every pass; on a GPU, half of its free memory."""

PIECE_NUMBERS = {"cpu": 2**19, "cuda": 2**26}
"""Number of values of features or logits processed at a time: fits a CPU's cache, or fills a GPU."""

LOGIT_BYTES = 9 * 2**28
"""Memory for the logits, their change and the weights of the columns that are solved together."""

CACHED_COLUMNS = 512
"""Columns that are solved together on a CPU."""

AXES_ROWS = 2**16
"""Approximate number of images used for the principal axes; they only precondition, so a sample is enough."""


class StandardisedRows:
    """Standardised rows of a feature matrix, read in pieces on a device.

    Args:
        features: (n, D) of any floating type, may be mapped from a file.
        rows: (m,) ascending, the rows to use; None: all.
        device: Device to compute on.
        mean: (D,) to subtract; with `scale` that of another set, else that of these rows.
        scale: (D,) to multiply by, 1 ÷ standard deviation, or 0 for a constant feature.
    """

    def __init__(
        self,
        features: Tensor,
        rows: Tensor | None = None,
        *,
        device: torch.device | None = None,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.features = features
        self.rows = rows
        self.device = torch.device("cpu") if device is None else device
        self.width = features.shape[1]
        self._size = max(1, PIECE_NUMBERS.get(self.device.type, 2**19) // self.width)
        if mean is None or scale is None:
            mean, scale = self._statistics()
        self.mean, self.scale = mean.to(self.device), scale.to(self.device)
        limit = IN_MEMORY_BYTES
        if self.device.type == "cuda":
            limit = torch.cuda.mem_get_info(self.device)[0] // 2
        self._in_memory = list(self._read()) if 4 * len(self) * self.width <= limit else None

    def __len__(self) -> int:
        return len(self.features) if self.rows is None else len(self.rows)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Slice of a piece, and its standardised features (c, D) float32."""
        return self._read() if self._in_memory is None else iter(self._in_memory)

    @property
    def columns_at_once(self) -> int:
        """Solutions to compute together: as many as the cache allows, or, if reading is expensive, as memory allows."""
        fits = max(1, LOGIT_BYTES // (12 * max(1, len(self))))
        return fits if self._in_memory is None or self.device.type == "cuda" else min(fits, CACHED_COLUMNS)

    def slices(self) -> Iterator[slice]:
        """Slices of the pieces."""
        return (slice(start, min(start + self._size, len(self))) for start in range(0, len(self), self._size))

    @cached_property
    def principal_axes(self) -> tuple[Tensor, Tensor]:
        """Variances (D, 1) and axes (D, D) of a sample of the rows, one axis per column."""
        gram, count = torch.zeros(self.width, self.width, device=self.device), 0
        every = max(1, len(self) // AXES_ROWS)
        for number, (_, inputs) in enumerate(self):
            if number % every == 0:
                gram.addmm_(inputs.T, inputs)
                count += len(inputs)
        # Not every device computes eigenvalues in float64, and the CPU takes seconds.
        variance, axes = torch.linalg.eigh(gram.cpu().double() / max(count, 1))
        return variance.clamp(min=0).float().to(self.device)[:, None], axes.float().to(self.device)

    def _read(self) -> Iterator[tuple[slice, Tensor]]:
        return ((piece, (raw - self.mean) * self.scale) for piece, raw in self._raw())

    def _raw(self) -> Iterator[tuple[slice, Tensor]]:
        for piece in self.slices():
            raw = self.features[piece] if self.rows is None else self.features[self.rows[piece]]
            yield piece, raw.to(self.device, torch.float32)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        total = torch.zeros(self.width, dtype=torch.float64)
        for _, raw in self._raw():
            total += raw.sum(0).cpu()
        mean = (total / max(len(self), 1)).float().to(self.device)
        squares = torch.zeros(self.width, dtype=torch.float64)
        for _, raw in self._raw():
            squares += (raw - mean).square().sum(0).cpu()
        deviation = (squares / max(len(self), 1)).sqrt().float().to(self.device)
        varies = deviation > 1e-6 * (mean.abs() + 1e-12)
        return mean, torch.where(varies, 1 / deviation, torch.zeros_like(deviation))


@dataclass(frozen=True)
class LinearClassifiers:
    """Solutions for each strength and label, on features standardised by `mean` and `scale`.

    Attributes:
        mean: (D,), subtracted from the features.
        scale: (D,), multiplied by.
        weights: (S, D, L), in the order of the strengths; 0 for a label without both a positive and a negative.
        bias: (S, L).
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor

    def logits(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (S, n, L) of features (n, D), or of some of their rows, on the CPU."""
        strengths, width, labels = self.weights.shape
        standardised = StandardisedRows(features, rows, device=self.weights.device, mean=self.mean, scale=self.scale)
        columns = self.weights.permute(1, 0, 2).reshape(width, strengths * labels)
        result = torch.empty(strengths, len(standardised), labels)
        for piece, inputs in standardised:
            result[:, piece] = (inputs @ columns).view(-1, strengths, labels).permute(1, 0, 2).cpu() + self.bias[
                :, None
            ].cpu()
        return result


def logistic_regression(
    features: Tensor | StandardisedRows,
    labels: Tensor,
    strengths: Sequence[float],
    *,
    pos_weight: PositiveWeight = 1.0,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
) -> LinearClassifiers:
    """Minimise, for each label and strength λ, mean log-loss + ½·λ·‖w‖² by preconditioned conjugate gradients.

    All labels and strengths are solved together, so that a step reads the features twice regardless of their number;
    converged pairs are removed. The preconditioner is the Hessian's diagonal along the principal axes of the features,
    (mean of p·(1−p)) · variance + λ. Step sizes along the conjugate directions (Polak–Ribière, restarted when they
    stop descending) are found by Newton's method.

    Args:
        features: (n, D), standardised here, or `StandardisedRows` of them.
        labels: (n, L) of 1, 0 and −1; −1 is left out of the label's mean.
        strengths: λ >= 0, one solution per value.
        pos_weight: Weight of a positive relative to a negative's 1 in a label's mean, as in torch's
            `BCEWithLogitsLoss`; "balanced" gives all positives of a label the weight of all its negatives.
        max_iterations: A solution that needs more is returned before convergence.
        tolerance: A label has converged if its Newton decrement, about twice the remaining decrease of the objective,
            is below `tolerance` times 1e-2 of the objective.

    Raises:
        ValueError: If `pos_weight` is not above 0.
    """
    check_pos_weight(pos_weight)
    standardised = features if isinstance(features, StandardisedRows) else StandardisedRows(features)
    device, num_labels, num_strengths = standardised.device, labels.shape[1], len(strengths)
    labels = labels.to(device, torch.int8)
    counts = torch.stack([(labels == 1).sum(0), (labels == 0).sum(0)]).double()
    learnable = (counts > 0).all(0)
    positive = (
        counts[1] / counts[0].clamp(min=1) if pos_weight == "balanced" else torch.full_like(counts[0], pos_weight)
    )
    total = (counts[0] * positive + counts[1]).clamp(min=1e-30)
    shares = torch.stack([positive / total, 1 / total]).where(learnable, 0.0).float()

    problem = _Problem(standardised, labels, shares)
    label = torch.arange(num_labels, device=device).repeat(num_strengths)
    penalty = torch.tensor([float(strength) for strength in strengths], device=device).repeat_interleave(num_labels)
    prior = ((counts[0] * positive) / total).where(learnable, 0.5).logit().float()
    weights, bias = problem.solve(label, penalty, prior[label], max_iterations, tolerance * 1e-2)
    by_strength = weights.view(standardised.width, num_strengths, num_labels).permute(1, 0, 2)
    return LinearClassifiers(standardised.mean, standardised.scale, by_strength, bias.view(num_strengths, num_labels))


def check_pos_weight(pos_weight: PositiveWeight) -> None:
    """Refuse an invalid weight of positives.

    Raises:
        ValueError: If it is neither above 0 and finite nor "balanced".
    """
    if pos_weight != "balanced" and not (isinstance(pos_weight, (int, float)) and 0 < pos_weight < float("inf")):
        raise ValueError(f"pos_weight={pos_weight!r} was given: pass a number above 0, or 'balanced'")


class _Problem:
    """Columns, each a label and a strength, that are minimised together.

    Args:
        standardised: (n, D).
        labels: (n, L) int8.
        shares: (2, L), weight of a positive and of a negative in the mean of a label; 0 for one that cannot be learned.
    """

    def __init__(self, standardised: StandardisedRows, labels: Tensor, shares: Tensor) -> None:
        self.standardised, self.labels, self.shares = standardised, labels, shares
        self.variance, self.axes = standardised.principal_axes

    def solve(
        self, label: Tensor, penalty: Tensor, bias: Tensor, max_iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """Weights (D, C) and biases (C,) of columns with a label (C,) and a penalty (C,), from initial biases."""
        solved = torch.zeros(self.standardised.width, len(label), device=label.device)
        solved_bias = bias.clone()
        active = torch.arange(len(label), device=label.device)
        # In the rotated coordinates; the last row is the bias, which has a variance of 1 and no penalty.
        weights = torch.cat([solved, bias[None]])
        penalties = torch.cat([penalty.expand_as(solved), torch.zeros_like(bias)[None]])
        variance = F.pad(self.variance, (0, 0, 0, 1), value=1.0)
        logits = bias.expand(len(self.standardised), -1).clone()
        share, pull = self._share_and_pull(label)
        old_scaled, direction = torch.zeros_like(weights), torch.zeros_like(weights)
        old_decrement = torch.ones_like(bias)
        for iteration in range(max_iterations + 1):
            gradient, spread, loss = self._gradient(logits, share)
            gradient += penalties * weights - pull
            scaled = gradient / (spread * variance + penalties).clamp(min=1e-8)
            decrement = (gradient * scaled).sum(0)
            objective = loss + (weights * (0.5 * penalties * weights - pull)).sum(0)
            going = decrement > tolerance * objective.clamp(min=0)
            if iteration == max_iterations or not going.any():
                going = torch.zeros_like(going)
            if going.float().mean() < 0.8:
                done = ~going
                solved[:, active[done]] = self.axes @ weights[:-1, done]
                solved_bias[active[done]] = weights[-1, done]
                if not going.any():
                    break
                active, logits, share, old_decrement, decrement = (
                    values[..., going] for values in (active, logits, share, old_decrement, decrement)
                )
                weights, penalties, pull, gradient, scaled, old_scaled, direction = (
                    values[:, going] for values in (weights, penalties, pull, gradient, scaled, old_scaled, direction)
                )
            momentum = ((decrement - (gradient * old_scaled).sum(0)) / old_decrement.clamp(min=1e-30)).clamp(min=0)
            direction = momentum * direction - scaled
            uphill = (direction * gradient).sum(0) >= 0
            direction = torch.where(uphill, -scaled, direction)
            change = self._change(direction)
            slope = (direction * gradient).sum(0)
            # Terms of the derivative along the direction besides the mean over images: a constant, and one per step.
            fixed, curvature = (direction * (penalties * weights - pull)).sum(0), (penalties * direction**2).sum(0)
            step = self._line_search(logits, change, share, slope, fixed, curvature)
            weights = weights + step * direction
            logits.addcmul_(change, step.expand_as(change))
            old_scaled, old_decrement = scaled, decrement
        return solved, solved_bias

    def _share_and_pull(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (n, C) of each image in the mean of a column, and the positives' gradient (D + 1, C).

        The log-loss is softplus(logit) minus the logit of a positive, which is linear in the weights, so that its
        gradient is computed once.
        """
        share = torch.empty(len(self.standardised), len(label), device=label.device)
        pull = torch.zeros(self.standardised.width + 1, self.labels.shape[1], device=label.device)
        for piece, inputs in self.standardised:
            labels = self.labels[piece]
            positive = (labels == 1) * self.shares[0]
            pull[:-1].addmm_(inputs.T, positive)
            pull[-1] += positive.sum(0)
            share[piece] = (positive + (labels == 0) * self.shares[1])[:, label]
        pull[:-1] = self.axes.T @ pull[:-1]
        return share, pull[:, label]

    def _gradient(self, logits: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the mean of softplus(logit): gradient (D + 1, C), mean (C,) of p·(1−p), and the mean itself (C,)."""
        gradient = torch.zeros(self.standardised.width + 1, share.shape[1], device=share.device)
        spread, loss = torch.zeros_like(gradient[0]), torch.zeros_like(gradient[0])
        for piece, inputs in self.standardised:
            probability = logits[piece].sigmoid()
            weighted = share[piece] * probability
            gradient[:-1].addmm_(inputs.T, weighted)
            gradient[-1] += weighted.sum(0)
            spread += weighted.addcmul_(weighted, probability, value=-1).sum(0)
            loss += F.softplus(logits[piece]).mul_(share[piece]).sum(0)
        gradient[:-1] = self.axes.T @ gradient[:-1]
        return gradient, spread, loss

    def _change(self, direction: Tensor) -> Tensor:
        """Change of the logits (n, C) by a step of 1."""
        columns = self.axes @ direction[:-1]
        change = torch.empty(len(self.standardised), direction.shape[1], device=direction.device)
        for piece, inputs in self.standardised:
            torch.addmm(direction[-1], inputs, columns, out=change[piece])
        return change

    def _line_search(
        self, logits: Tensor, change: Tensor, share: Tensor, slope: Tensor, fixed: Tensor, curvature: Tensor
    ) -> Tensor:
        # Newton's method on the increasing derivative along the direction; bisection if Newton leaves the bracket.
        low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        step = low
        for attempt in range(9):
            first, second = fixed + step * curvature, curvature.clone()
            for piece in self.standardised.slices():
                moved = change[piece]
                if attempt:
                    probability = torch.addcmul(logits[piece], moved, step.expand_as(moved)).sigmoid_()
                else:
                    probability = logits[piece].sigmoid()
                weighted = (share[piece] * moved).mul_(probability)
                first += weighted.sum(0)
                second += weighted.addcmul_(weighted, probability, value=-1).mul_(moved).sum(0)
            first = first if attempt else slope
            if (first.abs() <= 0.05 * slope.abs()).all():
                break
            low, high = torch.where(first <= 0, step, low), torch.where(first > 0, step, high)
            newton = torch.minimum(step - first / second.clamp(min=1e-30), 4 * low + 4)
            inside = (newton > low) & (newton < high) | (first == 0)
            step = torch.where(inside, newton, (low + high.clamp(max=4 * low + 4)) / 2)
        return step
