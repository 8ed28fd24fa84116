"""The floors of the library: an import only ever goes down, and only the two upper floors know Lightning."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlssl"

FLOORS = {
    3: [
        "__init__",
        "cli",
        "commands/__init__",
        "commands/completion",
        "commands/demo",
        "commands/evaluate",
        "commands/export",
        "commands/interrupts",
        "commands/neighbors",
        "commands/pack",
        "commands/report",
        "commands/results",
        "commands/run",
        "commands/views",
    ],
    2: [
        "module",
        "data/datamodule",
        "evaluation/protocols",
        "checkpoint",
        "metrics_file",
        "runs",
        "report/run",
        "callbacks/__init__",
        "callbacks/collapse",
        "callbacks/export",
        "callbacks/finite",
        "callbacks/knn",
        "callbacks/learning_rate",
        "callbacks/probe",
        "callbacks/random_state",
        "callbacks/representation",
        "callbacks/throughput",
        "callbacks/view_grid",
    ],
    1: [
        "views/blocks",
        "data/bad_images",
        "views/draws",
        "views/pixels",
        "data/coco",
        "data/corel5k",
        "data/datasets",
        "data/files",
        "data/formats",
        "data/loader",
        "data/manifest",
        "data/packing",
        "data/shards",
        "data/synthetic",
        "data/voc",
        "data/wrapped",
        "evaluation/cache",
        "evaluation/crops",
        "evaluation/features",
        "evaluation/few_labels",
        "evaluation/probe",
        "evaluation/sources",
        "export/__init__",
        "export/detectron2",
        "export/networks",
        "export/onnx",
        "export/sources",
        "visualize",
        "reading",
        "report/page",
        "report/content",
        "report/measure",
    ],
    0: [
        "losses",
        "chunks",
        "forms",
        "heads",
        "distributed",
        "optim",
        "backbones",
        "recompute",
        "small_maps",
        "atomic",
        "report/__init__",
        "report/figures",
        "report/verdicts",
        "views/__init__",
        "views/grid",
        "views/hue",
        "views/blurring",
        "views/photometric",
        "views/resizing",
        "data/__init__",
        "data/batches",
        "data/images",
        "data/records",
        "evaluation/__init__",
        "evaluation/geometry",
        "evaluation/logistic",
        "evaluation/metrics",
        "evaluation/neighbors",
    ],
}
"""Every file of the library, without its ending."""

BESIDE = {
    ("cli", "__init__"),
    ("cli", "commands/completion"),
    ("cli", "commands/demo"),
    ("cli", "commands/evaluate"),
    ("cli", "commands/export"),
    ("cli", "commands/neighbors"),
    ("cli", "commands/pack"),
    ("cli", "commands/report"),
    ("cli", "commands/run"),
    ("cli", "commands/views"),
    ("commands/demo", "commands/evaluate"),
    ("commands/completion", "commands/run"),
    ("commands/evaluate", "commands/results"),
    ("commands/demo", "commands/run"),
    ("commands/run", "commands/interrupts"),
    ("report/run", "module"),
    ("report/run", "data/datamodule"),
    ("report/content", "report/measure"),
    ("report/content", "report/page"),
    ("report/measure", "data/bad_images"),
    ("report/measure", "data/datasets"),
    ("report/measure", "data/loader"),
    ("report/measure", "evaluation/features"),
    ("report/measure", "evaluation/probe"),
    ("report/measure", "views/blocks"),
    ("reading", "evaluation/features"),
    ("callbacks/__init__", "callbacks/representation"),
    ("data/datasets", "data/bad_images"),
    ("data/datasets", "views/blocks"),
    ("data/formats", "data/coco"),
    ("data/formats", "data/corel5k"),
    ("data/formats", "data/files"),
    ("data/formats", "data/manifest"),
    ("data/formats", "data/shards"),
    ("data/formats", "data/synthetic"),
    ("data/formats", "data/voc"),
    ("data/loader", "data/datasets"),
    ("data/packing", "data/shards"),
    ("data/records", "data/images"),
    ("losses", "chunks"),
    ("losses", "forms"),
    ("evaluation/crops", "views/draws"),
    ("views/blocks", "views/draws"),
    ("views/blocks", "views/pixels"),
    ("views/photometric", "views/blurring"),
    ("views/photometric", "views/resizing"),
    ("views/pixels", "views/draws"),
    ("runs", "callbacks/__init__"),
    ("runs", "checkpoint"),
    ("runs", "data/datamodule"),
    ("runs", "metrics_file"),
    ("evaluation/features", "evaluation/cache"),
    ("evaluation/few_labels", "evaluation/features"),
    ("evaluation/few_labels", "evaluation/probe"),
    ("evaluation/probe", "evaluation/features"),
    ("export/__init__", "export/detectron2"),
    ("export/__init__", "export/networks"),
    ("export/__init__", "export/onnx"),
    ("export/__init__", "export/sources"),
    ("export/detectron2", "export/networks"),
    ("export/detectron2", "export/sources"),
    ("export/networks", "export/sources"),
    ("export/onnx", "export/sources"),
    ("evaluation/sources", "export/networks"),
    ("evaluation/sources", "export/sources"),
    ("callbacks/__init__", "callbacks/collapse"),
    ("callbacks/__init__", "callbacks/export"),
    ("callbacks/__init__", "callbacks/finite"),
    ("callbacks/__init__", "callbacks/knn"),
    ("callbacks/__init__", "callbacks/learning_rate"),
    ("callbacks/__init__", "callbacks/probe"),
    ("callbacks/__init__", "callbacks/random_state"),
    ("callbacks/__init__", "callbacks/throughput"),
    ("callbacks/__init__", "callbacks/view_grid"),
}
"""The few imports that stay on their floor."""

FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
LOWEST_WITH_LIGHTNING = 2


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names that a file imports anywhere, in functions too; `from a import b` may mean the module a.b.

    Args:
        source: Python.
        package: Dotted name of the package that the file lies in, which relative imports start from.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def files_of(modules: set[str]) -> set[str]:
    """Files of the library, as the table names them, that dotted names import."""
    files = set()
    for module in modules:
        top, _, rest = module.partition(".")
        name = rest.replace(".", "/")
        if top == "mlssl":
            files |= {"__init__" if not name else f"{name}/__init__" if f"{name}/__init__" in FLOOR_OF else name}
    return files & FLOOR_OF.keys()


def violations(name: str, source: str) -> list[str]:
    """Sentences about a file that breaks the order of the house; none for one that keeps it."""
    if name not in FLOOR_OF:
        return [f"mlssl/{name}.py stands on no floor: give it one in the table of this test and in the docs"]
    package = ".".join(["mlssl", *name.split("/")[:-1]])
    modules = imported_modules(source, package)
    libraries = {module.partition(".")[0] for module in modules}
    floor, wrong = FLOOR_OF[name], []
    for other in sorted(files_of(modules) - {name}):
        if FLOOR_OF[other] > floor or (FLOOR_OF[other] == floor and (name, other) not in BESIDE):
            wrong.append(f"mlssl/{name}.py on floor {floor} imports {other} on floor {FLOOR_OF[other]}")
    if floor < LOWEST_WITH_LIGHTNING and "lightning" in libraries:
        wrong.append(f"mlssl/{name}.py on floor {floor} imports lightning")
    if libraries & {"pytorch_lightning", "lightning_fabric"}:
        wrong.append(f"mlssl/{name}.py imports lightning under another name")
    return wrong


def library() -> dict[str, str]:
    """Name in the table → source of every file there is."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("name", sorted(library()))
def test_file_keeps_the_order_of_the_floors(name: str) -> None:
    assert violations(name, library()[name]) == []


def test_table_names_files_that_exist_and_each_once() -> None:
    listed = [name for names in FLOORS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= library().keys()
    used = {
        (name, other) for name, source in library().items() for other in files_of(imported_modules(source, "mlssl"))
    }
    assert not BESIDE - used, "nobody needs these exceptions any more"


@pytest.mark.parametrize(
    ("name", "source", "sentence"),
    [
        ("losses", "from mlssl.distributed import rank", "losses.py on floor 0 imports distributed on floor 0"),
        ("losses", "def f():\n    from mlssl.module import X", "losses.py on floor 0 imports module on floor 2"),
        ("losses", "import mlssl.heads as heads", "losses.py on floor 0 imports heads on floor 0"),
        ("losses", "from mlssl import heads", "losses.py on floor 0 imports heads on floor 0"),
        ("losses", "import mlssl", "losses.py on floor 0 imports __init__ on floor 3"),
        ("data/coco", "from .datamodule import X", "data/coco.py on floor 1 imports data/datamodule on floor 2"),
        ("data/coco", "from ..module import X", "data/coco.py on floor 1 imports module on floor 2"),
        ("data/coco", "from . import files", "data/coco.py on floor 1 imports data/files on floor 1"),
        (
            "export/__init__",
            "from mlssl.callbacks import X",
            "export/__init__.py on floor 1 imports callbacks/__init__ on floor 2",
        ),
        ("callbacks/export", "from mlssl.callbacks.probe import X", "imports callbacks/probe on floor 2"),
        ("heads", "import lightning as L", "heads.py on floor 0 imports lightning"),
        (
            "export/__init__",
            "if True:\n    from lightning.pytorch import Trainer",
            "export/__init__.py on floor 1 imports lightning",
        ),
        ("module", "import pytorch_lightning as pl", "module.py imports lightning under another name"),
        ("novelty", "", "mlssl/novelty.py stands on no floor"),
    ],
)
def test_each_way_to_break_the_order_is_caught(name: str, source: str, sentence: str) -> None:
    assert any(sentence in wrong for wrong in violations(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("module", "import lightning as L\nfrom mlssl.losses import x\nfrom mlssl.data.records import y"),
        ("data/coco", "from .records import Records\nfrom mlssl.data import records"),
        ("cli", "def f():\n    from mlssl.runs import x"),
        ("evaluation/probe", "from mlssl.evaluation.features import Features"),
        ("heads", "from torch import nn\nimport lightning_free"),
    ],
)
def test_imports_that_go_down_are_left_alone(name: str, source: str) -> None:
    assert violations(name, source) == []
