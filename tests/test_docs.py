"""The documentation is correct: its code runs, its commands, links, messages and names exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import yaml

import mlssl
import mlssl.callbacks
from mlssl.commands.parsing import command_parser
from mlssl.commands.trainer_help import TRAINER_HELP

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlssl"
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
PAGES = [*DOCS, README, CONTRIBUTING]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


class Fence(NamedTuple):
    page: Path
    line: int
    language: str
    comment: str
    """What stands in an HTML comment in front of it."""
    code: str


def fences(page: Path, language: str) -> list[Fence]:
    """Fences of a language in the order of the page."""
    pattern = re.compile(r"(?:^<!-- (.*?) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    found = [
        Fence(page, text.count("\n", 0, match.start(3)) + 1, match[2], match[1] or "", match[3])
        for match in pattern.finditer(text)
    ]
    return [fence for fence in found if fence.language == language]


def location(fence: Fence | Path) -> str:
    return fence.name if isinstance(fence, Path) else f"{fence.page.name}:{fence.line}"


# ---------------------------------------------------------------------- Python

RUNS = {page: [fence for fence in fences(page, "python") if not fence.comment.startswith("not run: ")] for page in DOCS}
SHOWN = [fence for page in PAGES for fence in fences(page, "python") if fence not in RUNS.get(page, [])]


@pytest.mark.parametrize("page", [page for page, code in RUNS.items() if code], ids=location)
def test_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for fence in RUNS[page]:
        code = "\n" * (fence.line - 1) + fence.code  # so that a traceback names the line of the page
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("fence", SHOWN, ids=location)
def test_python_that_is_only_shown_uses_existing_names_and_arguments(fence: Fence) -> None:
    tree = ast.parse(fence.code)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(fence.page), "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function: Any = names.get(ast.unparse(call.func).partition(".")[0])
        for attribute in ast.unparse(call.func).split(".")[1:]:
            function = getattr(function, attribute, None)
        if function is not None and not any(isinstance(one, ast.Starred) for one in call.args):
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(function).bind_partial(*call.args, **keywords)


# ---------------------------------------------------------------------- commands


def commands() -> Iterator[Any]:
    """Words after `mlssl` in every bash fence."""
    for fence in (fence for page in PAGES for fence in fences(page, "bash")):
        for line in fence.code.splitlines():
            for match in re.finditer(r"(?:^|[/\s])mlssl (?=[a-z])(.*?)(?: && |$)", line):
                yield pytest.param(shlex.split(match[1], comments=True), id=f"{location(fence)} {match[1][:30]}")


TOP = {"config", "name", "runs", "resume", "seed_everything", "ckpt_path", "start_from", "recipe", "model", "data"}
PARTS = {"trainer": L.Trainer, "model": mlssl.MultiLabelSSLModule, "data": mlssl.MultiLabelDataModule}


@pytest.mark.parametrize("words", list(commands()))
def test_command_and_its_options_exist(words: list[str]) -> None:
    command, options = words[0], [word.lstrip("-") for word in words[1:] if re.match("--?[a-z]", word)]
    if command not in TRAINER_HELP:
        assert set(options) <= {*command_parser(command).get_defaults().keys(), "o"}
        return
    for option in options:
        part, _, name = option.partition(".")
        argument = name.partition(".")[0]
        assert part in TOP or argument in inspect.signature(PARTS[part]).parameters, option


@pytest.mark.parametrize("name", ["main", "test"])
def test_commands_of_continuous_integration_are_single_lines(name: str) -> None:
    (fence,) = (fence for fence in fences(README, "bash") if fence.comment == f"ci:{name}")
    assert len(fence.code.splitlines()) == 1


# ---------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as generated by GitHub and MyST."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=location)
def test_links_have_existing_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_in_the_table_of_contents() -> None:
    lines = [line for fence in fences(ROOT / "docs" / "index.md", "{toctree}") for line in fence.code.splitlines()]
    listed = [line for line in lines if line and not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in DOCS if page.stem != "index")


def test_files_named_on_pages_exist() -> None:
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:examples|tests|mlssl|docs|\.github)/[\w./-]+\.\w+)`", page.read_text())
    }
    assert named
    assert [(page, path) for page, path in named if not (ROOT / path).exists()] == []


# ---------------------------------------------------------------------- architecture, names, messages


def test_every_package_has_a_line_in_the_architecture() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    table = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {path.parent.name for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE} <= table


def test_api_lists_the_public_names() -> None:
    text = (ROOT / "docs" / "api.md").read_text().partition("\n## ")[0]
    listed = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall("`(.*?)`", line)}
    imports = (node for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())))
    of_library = (node for node in imports if isinstance(node, ast.ImportFrom) and "mlssl" in (node.module or ""))
    assert listed == {alias.name for node in of_library for alias in node.names}


def test_every_callback_has_a_section() -> None:
    imports = ast.parse((PACKAGE / "callbacks" / "__init__.py").read_text()).body
    callbacks = {alias.name for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names}
    headings = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "callbacks.md").read_text(), re.MULTILINE))
    assert callbacks <= headings
    assert all(hasattr(mlssl.callbacks, name) for name in callbacks)


def texts(path: Path) -> str:
    """All strings of a file, one per line, without the values of f-strings."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            lines.append("…".join(str(one.value) for one in node.values if isinstance(one, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


def messages() -> list[str]:
    section = (ROOT / "docs" / "data.md").read_text().partition("## Bad input")[2]
    return re.findall(r"^\| [^`]*? \| `(.*?)` \|$", section, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_messages_quoted_on_pages_are_those_of_the_library(message: str) -> None:
    pieces = [piece for piece in message.split("…") if piece]
    assert any(all(piece in text for piece in pieces) for text in map(texts, PACKAGE.rglob("*.py")))


def test_every_message_of_the_table_is_looked_up() -> None:
    section = (ROOT / "docs" / "data.md").read_text().partition("## Bad input")[2]
    assert len(messages()) == section.count("\n| ") - 2 + 1  # all rows but the heading; its rule has no space


def test_changelog_contains_the_version() -> None:
    assert f"\n## {mlssl.__version__}\n" in (ROOT / "docs" / "changelog.md").read_text()


# ---------------------------------------------------------------------- .github


def test_guides_have_at_most_five_steps() -> None:
    guides = re.findall(r"^## How to add (.*?)\n(.*?)(?=^## )", CONTRIBUTING.read_text(), re.MULTILINE | re.DOTALL)
    steps = {what: len(re.findall(r"^\d\. ", text, re.MULTILINE)) for what, text in guides}
    parts = {"a preset of branches", "a form of the loss", "an export format"}
    assert steps.keys() == {"a reader", "a callback", "a backbone"} | parts
    assert all(1 <= number <= 5 for number in steps.values()), steps


def test_workflow_checks_lint_types_docs_and_tests_on_oldest_and_newest() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert {"ruff check", "ruff format --check", "mypy"} <= set(runs["lint"])
    assert "sphinx-build -W -b html docs docs/_build" in runs["docs"]
    assert f"/bin/{runs['test'][-2]}\n" in README.read_text()
    assert f"/bin/{runs['test'][-1]}\n" in (ROOT / ".ci" / "run").read_text()
    assert any("--resolution ${{ matrix.resolution }} -e '.[test]'" in run for run in runs["test"])
    oldest, newest = jobs["test"]["strategy"]["matrix"]["include"]
    assert oldest["resolution"] == "lowest-direct"
    assert f'requires-python = ">={oldest["python"]}"' in (ROOT / "pyproject.toml").read_text()
    assert newest["resolution"] == "highest"
    assert jobs["deploy"]["if"] == "github.ref == 'refs/heads/main'"
