"""Whether the sets of a run fit together and say something."""

from __future__ import annotations

from collections.abc import Mapping

from mlssl.data.records import Records


def check_own(sets: Mapping[str, Records | None], given: Mapping[str, object]) -> None:
    """Refuse custom sets that do not fit together, or not with what else was given.

    Args:
        sets: Name of the argument → records.
        given: Options of sets that are read.

    Raises:
        TypeError: A set is no `Records`.
        ValueError: Options were given too, the sets differ in classes or channels, or ``probe_train`` is unlabelled.
    """
    for name, records in sets.items():
        if records is not None and not isinstance(records, Records):
            raise TypeError(
                f"{name} is of type {type(records).__name__}: pass mlssl.Records(paths, labels, classes), "
                "or train the module on a loader of your own."
            )
    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None:
        raise ValueError(f"{option} and train were given: {option} is for a dataset that is read, leave out one.")
    probe_train = sets["probe_train"]
    if probe_train is not None and probe_train.labels is None:
        raise ValueError(f"probe_train is {probe_train!r}: pass labelled records, or leave it out.")
    channels = {name: records.channels for name, records in sets.items() if records is not None}
    if len(set(channels.values())) > 1:
        raise ValueError(f"The sets have different numbers of channels, {channels}: decode all of them alike.")
    check_classes(sets)


def check_presence(name: str, records: Records) -> None:
    """Refuse labels that say nothing.

    Raises:
        ValueError: No image shows any class, or no label is absent.
    """
    if records.labels is None:
        return
    if not (records.labels == 1).any():
        raise ValueError(
            f"No image of {name} shows any of its {len(records.classes)} classes, all of its labels are absent or "
            "unknown: correct the labels, or leave them out."
        )
    if not (records.labels == 0).any() and (records.labels == -1).any():
        raise ValueError(
            f"The labels of {name} are 1 and -1 and never 0, and -1 means unknown, so that no class can be scored: "
            "pass absent=-1 (--data.absent -1; in Python, to read_dataset) if it means absent, or 0 for what is absent."
        )


def remarks_on(name: str, records: Records) -> list[str]:
    """Sentences about the classes that a set has no image of, or of which it has all."""
    if records.labels is None:
        return []
    shown, is_known_absent = (records.labels == 1).any(axis=0), (records.labels == 0).any(axis=0)
    remarks = []
    always = [one for one, there in zip(records.classes, is_known_absent, strict=True) if not there]
    if always:
        remarks.append(
            f"{len(always)} of {len(records.classes)} classes are absent from no image of {name} and are left out of "
            f"its mAP: {', '.join(always[:5])}{', …' if len(always) > 5 else ''}"
        )
    absent = [one for one, is_shown in zip(records.classes, shown, strict=True) if not is_shown]
    if absent:
        remarks.append(
            f"{len(absent)} of {len(records.classes)} classes are shown by no image of {name} and are left out of its "
            f"mAP: {', '.join(absent[:5])}{', …' if len(absent) > 5 else ''}"
        )
    return remarks


def check_classes(sets: Mapping[str, Records | None]) -> None:
    """Refuse sets whose labels mean different classes.

    Raises:
        ValueError: Naming both and what differs.
    """
    labelled = {name: records for name, records in sets.items() if records is not None and records.labels is not None}
    for name, records in labelled.items():
        first_name, first = next(iter(labelled.items()))
        if records.classes != first.classes:
            differ = how_classes_differ(first_name, first, name, records)
            raise ValueError(f"{differ}: give both the same list of classes.")


def how_classes_differ(first_name: str, first: Records, name: str, records: Records) -> str:
    """Numbers of classes of two sets, and which of them only one set has, or that their order is another."""
    differing = sorted(set(records.classes) ^ set(first.classes))
    what = f" (only in one of them: {', '.join(differing[:5])})" if differing else " in another order"
    return f"{first_name} has {len(first.classes)} classes and {name} has {len(records.classes)}{what}"


def check_steps(num_images: int, batch_size: int, devices: int) -> None:
    """Refuse a training set that fills no step.

    Raises:
        ValueError: A step takes more images than there are.
    """
    step = batch_size * devices
    if num_images < step:
        raise ValueError(
            f"The training set has {num_images} images, and a step takes {step} "
            f"(batch_size {batch_size} on {devices} device(s)): pass a smaller batch_size."
        )


def check_same_steps(steps: int, saved: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Refuse to go on in the middle of an epoch with other steps than those of the checkpoint.

    Args:
        steps: Of the epoch that were made.
        saved: "images" and "images_per_step", over all devices, of the run that saved it.
        now: Of this one.

    Raises:
        ValueError: They differ.
    """
    if saved != now:
        raise ValueError(
            f"The checkpoint was saved after {steps} steps of an epoch, with {saved['images_per_step']} of "
            f"{saved['images']} images a step, and now a step takes {now['images_per_step']} of {now['images']}: "
            "keep batch_size × devices and the images, or go on from a checkpoint at the end of an epoch."
        )
