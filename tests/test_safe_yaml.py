"""YAML: plain values, or one sentence with file and line, before anything large is built."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import yaml

from mlssl.cli import main
from mlssl.safe_yaml import MAX_DEPTH, parse_yaml, read_yaml

LETTERS = "abcdefghi"
BOMB = f"a: &a [{','.join('x' * 9)}]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise(LETTERS)
)
"""300 bytes that are 4 GB once the aliases are followed."""


def test_plain_values_and_aliases_are_read(tmp_path: Path) -> None:
    text = "a: &x {size: [1, 2.5]}\nb: *x\nc: {<<: *x, d: null}\ne: 2020-01-01\n'f': é\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)
    assert parse_yaml("", "--config") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"a\.yaml, line 7: more than 10,000,000 entries and characters after alias expansion"),
        ("[" * (MAX_DEPTH + 1), r"a\.yaml, line 1: nested more than 100 deep: write it flatter"),
        ("a: " + "{b: " * 100_000, r"a\.yaml, line 1: nested more than 100 deep"),
        ("a: &a\n- *a\n", r"a\.yaml, line 2: 'a' contains itself"),
        ("a: *b", r"a\.yaml cannot be read as YAML: .*undefined alias.*line 1"),
        ("a: [\nb: ]: c", r"a\.yaml cannot be read as YAML: .*line 2"),
        ("a: !!python/object/apply:os.system [true]", r"a\.yaml cannot be read as YAML: could not determine a constr"),
        ("a: !!bool x", r"a\.yaml cannot be read as YAML: KeyError"),
        ("a: 2020-99-99", r"a\.yaml cannot be read as YAML: ValueError month must be in"),
        ("? [a]\n: b", r"a\.yaml cannot be read as YAML: .*unhashable"),
    ],
)
def test_unreadable_yaml_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "a.yaml")
    assert time.monotonic() - started < 5


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read as YAML: 'utf-8' codec"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "a.yaml"],
        ["fit", "--config", BOMB],
        ["fit", "--recipe", "a.yaml"],
        ["fit", "--resume", "run"],
        ["report", "run"],
        ["views", "a.png", "--config", "a.yaml"],
        ["views", "a.png", "--branches", BOMB],
        ["views", "a.png", "--local_views", BOMB],
        ["linear", "resnet18", "--fractions", BOMB],
        ["fit", "--data.branches", BOMB],
        ["fit", "--model.backbone_kwargs", BOMB],
        ["fit", "--trainer.callbacks", BOMB],
        ["fit", "--trainer.callbacks", "a.yaml"],
        ["fit", "--seed_everything", BOMB],
    ],
    ids=lambda words: " ".join(words)[:24],
)
def test_every_command_refuses_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    for path in ("a.yaml", "run/config.yaml"):
        Path(path).write_text(BOMB)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "more than 10,000,000 entries and characters after alias expansion" in line
