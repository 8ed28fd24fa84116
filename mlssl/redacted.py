"""Hide the secrets of a command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"
"""Replaces a secret."""

_NAME = (
    r"(?:[\w.-]*[._-])?(?:api_?key|access_?key|secret_?key|token|secret|password|passwd|credentials?|signature|sig|key)"
)
"""Name of an option, an entry of a mapping or a query part whose value is a secret."""

_ADDRESS = re.compile(r"(?<=://)[^/\s@]*@")
"""User and password of a URL."""

_ENTRY = re.compile(
    rf"""(?P<before>(?<![\w.-])(?:--)?["']?{_NAME}["']?\s*[=:]\s*)(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,;&}}\]"']+)""",
    re.IGNORECASE,
)

_OPTION = re.compile(rf"(--{_NAME})(=.*)?", re.IGNORECASE | re.DOTALL)

_KEYS = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{40}|wandb_v\d_\w{20,}|hf_\w{20,}|gh[a-z]_\w{20,}|AKIA\w{16})(?![0-9A-Za-z])"
)
"""Keys of Weights & Biases, Hugging Face, GitHub and Amazon, anywhere in a text."""

_PLAIN = re.compile(r"""["']?(?:true|false|null|none|\d{1,3})["']?""", re.IGNORECASE)
"""Values that are not secret, such as that of ``class_token``."""


def redacted(words: Sequence[str]) -> str:
    """Words of a command quoted for a shell, with ``***`` in place of secrets.

    Hidden are user and password in a URL; the values of options, entries and query parts whose last name marks them as
    secret (``api_key``, ``token``, ``secret``, ``password``, ``signature``, …); and keys with a known format: those of
    Weights & Biases, Hugging Face, GitHub and Amazon.

    >>> redacted(["mlssl", "fit", "--data.root", "https://me:pass@host/photos"])
    "mlssl fit --data.root 'https://***@host/photos'"
    """
    shown, is_secret = [], False
    for word in words:
        is_value = is_secret and not word.startswith("--")
        option = _OPTION.fullmatch(word)
        is_secret = option is not None and option[2] is None
        shown.append(HIDDEN if is_value and not _PLAIN.fullmatch(word) else _hidden(word, option))
    return " ".join(word if word == HIDDEN else shlex.quote(word) for word in shown)


def _hidden(word: str, option: re.Match[str] | None) -> str:
    if option is not None and option[2] and not _PLAIN.fullmatch(option[2][1:]):
        return f"{option[1]}={HIDDEN}"
    return _KEYS.sub(HIDDEN, _ENTRY.sub(_entry, _ADDRESS.sub(f"{HIDDEN}@", word)))


def _entry(found: re.Match[str]) -> str:
    value = found["value"]
    if _PLAIN.fullmatch(value):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found['before']}{quote}{HIDDEN}{quote}"
