"""Words of a user's on a figure: names of classes, of files and of backbones."""

from __future__ import annotations


def plain(words: str) -> str:
    r"""The words as matplotlib draws them letter by letter: no formula between two dollars, and only letters of UTF-8.

    >>> print(plain("from $5 to $9"), plain("caf\udce9.jpg"))
    from \$5 to \$9 caf\udce9.jpg
    """
    return words.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")
