"""The only XML reader: bounded depth, no custom entities, no external files."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

MAX_DEPTH = 100
"""Maximum nesting of elements."""

_ENCODING = re.compile(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


def read_xml(path: Path) -> Element:
    """Root element of a file; tags and attributes are without namespace.

    Raises:
        ValueError: It is not XML, has an unknown encoding, declares entities, which could expand without bound, or is
            nested too deeply; names the file.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        try:
            return _parsed(content)
        except ValueError:  # expat knows no multi-byte encodings except UTF-8 and UTF-16
            declared = _ENCODING.match(content)
            if declared is None:
                raise
            text = content.decode(declared[1].decode("ascii"))
            return _parsed(text[text.index("?>") + 2 :].lstrip().encode())
    except _RefusedError as error:
        raise ValueError(f"{str(path)!r} {error}") from None
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ValueError(f"{str(path)!r} is not XML ({error}): fetch the annotation again") from error


class _RefusedError(Exception):
    """Valid XML that is refused."""


def _parsed(content: bytes) -> Element:
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise _RefusedError(f"is nested more than {MAX_DEPTH} deep: fetch the annotation again")
        builder.start(_local(tag), {_local(name): value for name, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_local(tag))

    def entity(name: str, *_: object) -> None:
        raise _RefusedError(f"declares the entity {name!r}: write its text out, annotations need none")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = entity
    parser.buffer_text = True
    parser.Parse(content, True)
    return builder.close()


def _local(name: str) -> str:
    return name.rpartition("}")[2]
