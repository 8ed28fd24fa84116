"""User text in figures: names of classes, files and backbones."""

from __future__ import annotations


def plain(words: str) -> str:
    r"""Escape text for matplotlib: no formula between two dollars, and only valid UTF-8.

    >>> print(plain("from $5 to $9"), plain("caf\udce9.jpg"))
    from \$5 to \$9 caf\udce9.jpg
    """
    return words.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")
