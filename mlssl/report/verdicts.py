"""What the numbers of a run say in words, by thresholds that each sentence names."""

from __future__ import annotations

from typing import Literal, NamedTuple

from mlssl.evaluation.collapse import MIN_RANK, MIN_STD, REMEDY

MIN_GAIN = 0.01
"""Least rise of the probe's mAP over the start of the run that counts; less is what another seed may give."""

MIN_GAP = 0.1
"""Least distance of the mean cosines within images and between images, where no labels tell more."""

WAITING, SOME_WAITING = 0.5, 0.2
"""Shares of a step's time spent on waiting for data: more than half is bound by data, less than a fifth is not."""


MIN_STEPS = 100
"""Least steps of a run of which anything is said: before, the learning rate is still rising, and numbers jump."""

TOO_EARLY = "Too early to say."


class Verdict(NamedTuple):
    """An answer to a question about a run: `state` is how it is marked, `answer` and `reason` are for the reader."""

    question: str
    state: Literal["good", "unsure", "bad"]
    answer: str
    reason: str


def is_learning(start: float | None, end: float | None, start_gap: float, end_gap: float, steps: int) -> Verdict:
    """Say whether the features have become better.

    Args:
        start: mAP of a linear probe at the start of the run, 0–1; None without labels.
        end: At its end.
        start_gap: Mean cosine of views of one image minus that of two images, at the start.
        end_gap: At the end.
        steps: That were taken.
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
            return Verdict(question, "unsure", "Hardly.", reason + " Train longer, or look at the views.")
        return Verdict(question, "bad", "No.", reason + " Look at the views, the learning rate and the overlap.")
    reason = (
        f"Without labels only the views tell: those of one image are closer than those of two images by {end_gap:.2f} "
        f"(mean cosine), at the start by {start_gap:.2f}; {MIN_GAP:g} more counts."
    )
    if steps < MIN_STEPS:
        return Verdict(question, "unsure", TOO_EARLY, reason + _taken(steps))
    if end_gap - start_gap >= MIN_GAP:
        return Verdict(question, "good", "It tells images apart.", reason)
    return Verdict(question, "unsure", "Not to be seen.", reason + " Train longer, or give a labelled val set.")


def has_collapsed(spread: float, rank: float, num_views: int, steps: int) -> Verdict:
    """Say whether the projections have become alike.

    Args:
        spread: `mlssl.evaluation.geometry.spread` of the projections, 0 to 1.
        rank: Their effective rank.
        num_views: Views that both are taken from, which bound the rank.
        steps: That were taken.
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
        return Verdict("Has it collapsed?", "unsure", "Not yet.", reason + " The spread is low: keep an eye on it.")
    return Verdict("Has it collapsed?", "good", "No.", reason)


def waits_for_data(data: float | None, step: float | None, images_per_s: float | None) -> Verdict:
    """Say whether the loader holds the network up.

    Args:
        data: Seconds of a step spent on waiting for its batch; None if it was not logged.
        step: Seconds of the rest of it.
        images_per_s: Of all devices.
    """
    question = "Does it wait for data?"
    if data is None or step is None or data + step <= 0:
        return Verdict(question, "unsure", "Not known.", "The run has logged no time/data and time/step (Throughput).")
    share = data / (data + step)
    speed = "" if images_per_s is None else f" at {images_per_s:.0f} images a second"
    reason = (
        f"{share:.0%} of a step is spent on waiting for its batch ({1000 * data:.0f} ms of "
        f"{1000 * (data + step):.0f} ms){speed}; more than {WAITING:.0%} is bound by data, less than "
        f"{SOME_WAITING:.0%} is not."
    )
    if share > WAITING:
        return Verdict(question, "bad", "Yes.", reason + " Raise --data.num_workers, or store smaller images.")
    if share > SOME_WAITING:
        return Verdict(question, "unsure", "Somewhat.", reason + " More workers may help.")
    return Verdict(question, "good", "No.", reason)


def _taken(steps: int) -> str:
    return f" The run took {steps:,} steps, and fewer than {MIN_STEPS} say little."
