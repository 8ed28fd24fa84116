"""Verdicts on a run: its numbers against thresholds, each stated in the verdict."""

from __future__ import annotations

from typing import Literal, NamedTuple

from mlssl.evaluation.collapse import MIN_RANK, MIN_STD, REMEDY

MIN_GAIN = 0.01
"""Minimum rise of the probe's mAP that counts as learning; less may be seed noise."""

MIN_GAP = 0.1
"""Minimum difference between mean cosines within and between images, for runs without labels."""

WAITING, SOME_WAITING = 0.5, 0.2
"""Fractions of a step's time spent waiting for data: above half the run is data-bound, below a fifth it is not."""


MIN_STEPS = 100
"""Minimum number of steps for a verdict: before, the learning rate still rises and numbers fluctuate."""

TOO_EARLY = "Too early to say."


class Verdict(NamedTuple):
    """An answer to a question about a run; `state` is its colour."""

    question: str
    state: Literal["good", "unsure", "bad"]
    answer: str
    reason: str


def is_learning(start: float | None, end: float | None, start_gap: float, end_gap: float, steps: int) -> Verdict:
    """Whether the features have improved.

    Args:
        start: Linear probe mAP at the start of the run, 0–1; None without labels.
        end: Linear probe mAP at its end.
        start_gap: Mean cosine within images minus mean cosine between images, at the start.
        end_gap: The same at the end.
        steps: Steps taken.
    """
    question = "Is it learning?"
    if start is not None and end is not None:
        reason = (
            f"A linear probe on the frozen features goes from {start:.3f} at the start to {end:.3f} "
            f"({end - start:+.3f} mAP); a rise above {MIN_GAIN:g} counts."
        )
        if steps < MIN_STEPS:
            return Verdict(question, "unsure", TOO_EARLY, reason + _taken(steps))
        if end - start > MIN_GAIN:
            return Verdict(question, "good", "Yes.", reason)
        if end - start > 0:
            return Verdict(question, "unsure", "Hardly.", reason + " Train longer, or check the views.")
        return Verdict(question, "bad", "No.", reason + " Check the views, the learning rate and the overlap.")
    reason = (
        f"Without labels, views are compared: within an image their mean cosine is higher than between images by "
        f"{end_gap:.2f}, at the start by {start_gap:.2f}; a gain of {MIN_GAP:g} counts."
    )
    if steps < MIN_STEPS:
        return Verdict(question, "unsure", TOO_EARLY, reason + _taken(steps))
    if end_gap - start_gap >= MIN_GAP:
        return Verdict(question, "good", "It separates images.", reason)
    return Verdict(question, "unsure", "Unclear.", reason + " Train longer, or pass a labelled val set.")


def has_collapsed(spread: float, rank: float, num_views: int, steps: int) -> Verdict:
    """Whether the projections have collapsed.

    Args:
        spread: `mlssl.evaluation.geometry.spread` of the projections, 0 to 1.
        rank: Their effective rank.
        num_views: Number of projections, an upper bound of the rank.
        steps: Steps taken.
    """
    reason = (
        f"The projections of {num_views} views have spread {spread:.2f} (1 is healthy, below {MIN_STD:g} is not) "
        f"and effective rank {rank:.1f} (below {MIN_RANK:g} is not healthy)."
    )
    if spread < MIN_STD or rank < MIN_RANK:
        return Verdict("Has it collapsed?", "bad", "Yes.", f"{reason} {REMEDY}")
    if steps < MIN_STEPS:
        return Verdict("Has it collapsed?", "unsure", TOO_EARLY, reason + _taken(steps))
    if spread < 0.5:
        return Verdict("Has it collapsed?", "unsure", "Not yet.", reason + " The spread is low: monitor it.")
    return Verdict("Has it collapsed?", "good", "No.", reason)


def waits_for_data(data: float | None, step: float | None, images_per_s: float | None) -> Verdict:
    """Whether the loader is the bottleneck.

    Args:
        data: Seconds per step spent waiting for the batch; None if not logged.
        step: Seconds of the rest of the step.
        images_per_s: Images per second of all devices.
    """
    question = "Does it wait for data?"
    if data is None or step is None or data + step <= 0:
        return Verdict(question, "unsure", "Not known.", "The run has logged no time/data and time/step (Throughput).")
    share = data / (data + step)
    speed = "" if images_per_s is None else f" at {images_per_s:.0f} images per second"
    reason = (
        f"{share:.0%} of a step is spent waiting for its batch ({1000 * data:.0f} ms of "
        f"{1000 * (data + step):.0f} ms){speed}; above {WAITING:.0%} a run is data-bound, below "
        f"{SOME_WAITING:.0%} it is not."
    )
    if share > WAITING:
        return Verdict(question, "bad", "Yes.", reason + " Raise --data.num_workers, or store smaller images.")
    if share > SOME_WAITING:
        return Verdict(question, "unsure", "Somewhat.", reason + " More workers may help.")
    return Verdict(question, "good", "No.", reason)


def _taken(steps: int) -> str:
    return f" The run took only {steps:,} steps; a verdict needs at least {MIN_STEPS}."
