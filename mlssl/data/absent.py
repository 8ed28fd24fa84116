"""Which label values mean absent: 0 always, −1 and blanks if the user says so."""

from __future__ import annotations

from collections.abc import Sequence


def absent_values(absent: int | str | Sequence[int | str] | None) -> dict[str, int]:
    """Map "-1" and "blank" to the label each one means: 0 absent, −1 unknown.

    Args:
        absent: −1, "blank", a list of them, or 0, which always means absent. None: only 0.

    Raises:
        ValueError: Anything else.

    >>> absent_values(-1), absent_values(None)
    ({'-1': 0, 'blank': -1}, {'-1': -1, 'blank': -1})
    """
    given = [] if absent is None else [absent] if isinstance(absent, (int, str)) else list(absent)
    words = [str(one) for one in given]
    if not set(words) <= {"0", "-1", "blank"}:
        raise ValueError(f"absent={absent!r} was given: pass -1, 'blank', a list of both, or 0 if only 0 is absent")
    return {value: 0 if value in words else -1 for value in ("-1", "blank")}
