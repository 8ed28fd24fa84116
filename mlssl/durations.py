"""Durations in words."""


def in_words(seconds: float) -> str:
    """A duration to two figures.

    >>> in_words(42.4), in_words(95), in_words(605), in_words(12000), in_words(400000)
    ('42 s', '1 min 35 s', '10 min', '3 h 20 min', '4 days 15 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
