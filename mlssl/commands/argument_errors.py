"""Parser errors in one sentence: the setting, what it accepts, what was given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_UNINFORMATIVE = ("Not a valid subclass", "Subclass types expect", "Expected a dot import path")


def plain_message(message: str, command: str, known: Iterable[str]) -> str:
    """The parser's message in one line; for a misspelt setting, with the nearest existing one.

    Args:
        message: Message of jsonargparse.
        command: Command of the parser, such as ``fit``.
        known: Names of its settings, such as ``data.size``.
    """
    message, known = " ".join(message.split()), sorted(set(known))
    if re.search("[Gg](iven|ot) value: ", message):
        return _value_message(message)
    named = re.search(r"(?:option|key|argument)s?:? [\"']?-{0,2}([A-Za-z_][\w.]*)", message, re.IGNORECASE)
    if named is None or named[1] in known:
        return message
    near = difflib.get_close_matches(named[1], known, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ":"
    return f"there is no setting {named[1]!r}{meant} `mlssl {command} --help_all` lists them"


def _value_message(message: str) -> str:
    """Message about a value of the wrong type; for a class, the first of its errors."""
    key = re.search(r'(?:Parser key|argument) "?([\w.]+)"?', message)
    setting = f"--{key[1]}" if key else "--trainer.callbacks"
    required = re.search(r"class_path '([\w.]+)': the following arguments are required: ([\w, ]+?)(?= - |$)", message)
    if required:
        name = required[1].rpartition(".")[2]
        return f"{name} needs {', '.join(f'{setting}.{one.strip()}' for one in required[2].split(','))}"
    about, _, given = (part.strip(" .") for part in re.split(r"(Given value: |[Gg]ot value: )", message, maxsplit=1))
    about, given = about.partition(" Given value type")[0], given.partition(" - ")[0]
    if "class_path" in about or "Callback'" in about:
        errors = re.split(r"(?:^|Errors:)? - ", about)[1:]
        said = next((one for one in errors if one and not one.startswith(_UNINFORMATIVE)), "")
        return f"{setting}: {said}" if said else message
    literals = re.findall(r"Literal\[([^]]*)\]", about)
    choices = [one.strip(" '\"") for one in ",".join(literals).split(",") if one]
    choices += [_KINDS[one] for one in re.findall(r"<class '(\w+)'>", about) if one in _KINDS]
    return f"{setting} takes {', '.join(dict.fromkeys(choices))}, and {given} was given" if choices else message
