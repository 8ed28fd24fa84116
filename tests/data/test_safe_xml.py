"""Untrusted XML: read, or refused in one sentence, without expansion and without opening other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlssl.data.safe_xml import MAX_DEPTH, read_xml

BOMB = "<!DOCTYPE a [" + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha"}">' for n in range(12)) + "]>"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"{BOMB}<a>&l11;</a>", r"declares the entity 'l0': write its text out, annotations need none"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "other.txt">]><a>&x;</a>', "declares the entity 'x'"),
        ('<!DOCTYPE a [<!ENTITY % x SYSTEM "other.txt"> %x;]><a/>', "declares the entity 'x'"),
        ("<a>" * (MAX_DEPTH + 1), f"is nested more than {MAX_DEPTH} deep"),
        ("<a>" * 200_000, f"is nested more than {MAX_DEPTH} deep"),
        ("<a><b></a>", r"is not XML \(mismatched tag.*\): fetch the annotation again"),
        ("", r"is not XML \(no element found.*\)"),
        ("no", r"is not XML \(syntax error.*\)"),
    ],
    ids=["bomb", "other file", "parameter", "deep", "deeper", "tags", "empty", "text"],
)
def test_refuses_in_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("secret")
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"'.*a\.xml' {sentence}") as caught:
        read_xml(path)
    assert "secret" not in str(caught.value)


def test_reads_the_greatest_depth_and_a_document_type_without_entities(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text('<!DOCTYPE a SYSTEM "a.dtd">' + "<a>" * MAX_DEPTH + "x&amp;y" + "</a>" * MAX_DEPTH)
    assert "".join(read_xml(path).itertext()) == "x&y"
