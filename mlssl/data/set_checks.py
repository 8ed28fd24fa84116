"""Check that the sets of a run match and have informative labels."""

from __future__ import annotations

from collections.abc import Mapping

from mlssl.data.records import Records


def check_custom(sets: Mapping[str, Records | None], given: Mapping[str, object]) -> None:
    """Refuse custom sets that do not match each other or the other options.

    Args:
        sets: Name of the argument → records.
        given: Options for sets read from disk.

    Raises:
        TypeError: A set is not a `Records`.
        ValueError: Options were also given, the sets differ in classes or channels, or ``probe_train`` is unlabelled.
    """
    for name, records in sets.items():
        if records is not None and not isinstance(records, Records):
            raise TypeError(
                f"{name} is of type {type(records).__name__}: pass mlssl.Records(paths, labels, classes), "
                "or train the module on a custom loader."
            )
    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None:
        raise ValueError(f"{option} and train were given: {option} is for a data set read from disk, leave out one.")
    probe_train = sets["probe_train"]
    if probe_train is not None and probe_train.labels is None:
        raise ValueError(f"probe_train is {probe_train!r}: pass labelled records, or leave it out.")
    channels = {name: records.channels for name, records in sets.items() if records is not None}
    if len(set(channels.values())) > 1:
        raise ValueError(f"The sets have different numbers of channels, {channels}: decode all of them alike.")
    check_classes(sets)


def check_presence(name: str, records: Records) -> None:
    """Refuse uninformative labels.

    Raises:
        ValueError: No image shows any class, or no label is absent.
    """
    if records.labels is None:
        return
    if not (records.labels == 1).any():
        raise ValueError(
            f"No image of {name} shows any of its {len(records.classes)} classes, all labels are absent or unknown: "
            "correct the labels, or leave them out."
        )
    if not (records.labels == 0).any() and (records.labels == -1).any():
        raise ValueError(
            f"The labels of {name} are 1 and -1 and never 0, and -1 means unknown, so no class can be scored: pass "
            "absent=-1 (--data.absent -1; in Python, to read_dataset) if -1 means absent, or write 0 for absent."
        )


def remarks_on(name: str, records: Records) -> list[str]:
    """Sentences about classes that are shown by no image of a set or absent from none."""
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
    """Refuse sets with different classes.

    Raises:
        ValueError: Names both sets and the difference.
    """
    labelled = {name: records for name, records in sets.items() if records is not None and records.labels is not None}
    for name, records in labelled.items():
        first_name, first = next(iter(labelled.items()))
        if records.classes != first.classes:
            differ = how_classes_differ(first_name, first, name, records)
            raise ValueError(f"{differ}: use the same list of classes for both.")


def how_classes_differ(first_name: str, first: Records, name: str, records: Records) -> str:
    """Describe how the classes of two sets differ: in number, in names, or only in order."""
    differing = sorted(set(records.classes) ^ set(first.classes))
    what = f" (only in one of them: {', '.join(differing[:5])})" if differing else " in another order"
    return f"{first_name} has {len(first.classes)} classes and {name} has {len(records.classes)}{what}"


def check_steps(num_images: int, batch_size: int, devices: int) -> None:
    """Refuse a training set smaller than one step.

    Raises:
        ValueError: A step needs more images.
    """
    step = batch_size * devices
    if num_images < step:
        raise ValueError(
            f"The training set has {num_images} images, and a step needs {step} (batch_size {batch_size} on {devices} "
            "device(s)): pass a smaller batch_size."
        )


def check_same_steps(steps: int, saved: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Refuse to resume in mid-epoch with steps of a different size.

    Args:
        steps: Steps of the epoch already done.
        saved: "images" and "images_per_step", over all devices, of the saved run.
        now: The same for this run.

    Raises:
        ValueError: They differ.
    """
    if saved != now:
        raise ValueError(
            f"The checkpoint was saved after {steps} steps of an epoch, with {saved['images_per_step']} of "
            f"{saved['images']} images per step, and now a step has {now['images_per_step']} of {now['images']}: keep "
            "batch_size × devices and the images, or resume from a checkpoint at the end of an epoch."
        )
