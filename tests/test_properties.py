"""Properties for every input: grid and views, the loss in its forms and at its extremes, and readers."""

from __future__ import annotations

import csv
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlssl.data.batches import check_view_batch
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.python_sets import read_dataset
from mlssl.data.readers.voc import VOC_CLASSES, read_voc
from mlssl.data.records import Records
from mlssl.losses import image_aware_contrastive_loss, negative_cosine_similarity
from mlssl.views.blocks import BlockViews
from mlssl.views.grid import MAX_OVERLAP, block_grid
from mlssl.views.recipe import PRESETS

PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=100)


@PROPERTY
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    rows=st.integers(1, 8),
    cols=st.integers(1, 8),
    overlap=st.floats(0, MAX_OVERLAP),
)
def test_blocks_are_equal_inside_and_in_order_and_leave_no_gap(
    height: int, width: int, rows: int, cols: int, overlap: float
) -> None:
    boxes = block_grid(height, width, rows, cols, overlap)
    assert len(boxes) == rows * cols
    assert len({(box.height, box.width) for box in boxes}) == 1
    for side, starts, size in (
        (height, [box.top for box in boxes[::cols]], boxes[0].height),
        (width, [box.left for box in boxes[:cols]], boxes[0].width),
    ):
        assert starts == sorted(starts)
        assert starts[0] == 0
        assert starts[-1] + size == side
        if size * len(starts) >= side:  # as under any overlap that is not lost in rounding
            assert all(after <= before + size for before, after in pairwise(starts))
    assert [box[:2] for box in boxes] == [(top.top, left.left) for top in boxes[::cols] for left in boxes[:cols]]


@settings(PROPERTY, max_examples=50)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    preset=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 2**64),
)
def test_views_show_parts_of_their_block_and_local_views_parts_of_the_image(
    height: int, width: int, preset: str, seed: int
) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    views = BlockViews(16, branches=preset, local_views={"count": 2, "size": 8})
    made = views.arrays(image, np.random.default_rng(seed))
    boxes, local_boxes = made["boxes"].astype(float), made["local_boxes"].astype(float)
    assert (boxes[..., 2:] > 0).all()
    assert (local_boxes[..., 2:] > 0).all()
    blocks = np.array(views.boxes(height, width)) / (height, width, height, width)
    assert (boxes[..., :2] >= blocks[:, :2] - 1e-6).all()
    assert (boxes[..., :2] + boxes[..., 2:] <= blocks[:, :2] + blocks[:, 2:] + 1e-6).all()
    assert (local_boxes[..., :2] >= 0).all()
    assert (local_boxes[..., :2] + local_boxes[..., 2:] <= 1 + 1e-6).all()
    optional = {name: torch.from_numpy(array)[None] for name, array in made.items()}
    check_view_batch({**optional, "image_ids": torch.tensor([0])})


@st.composite
def feature_sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Anchors (R, P) in float64 and ids (R,) of up to 8 images, unevenly many; equal and opposite rows are likely."""
    rows, width = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    element = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1e3, 1e3, allow_subnormal=False)
    lines = draw(st.lists(st.lists(element, min_size=width, max_size=width), min_size=rows, max_size=rows))
    ids = draw(st.lists(st.integers(0, 7), min_size=rows, max_size=rows))
    return torch.tensor(lines, dtype=torch.float64), torch.tensor(ids)


FORMS = st.sampled_from(
    [{"form": "log_of_sum"}, {"form": "mean_of_logs"}, {"form": "mean_of_logs", "positives": "gated(0.3)"}]
)


@PROPERTY
@given(given_set=feature_sets(), form=FORMS, chunk=st.integers(1, 13), seed=st.integers(0, 99))
def test_order_and_chunks_change_neither_loss_nor_gradient(
    given_set: tuple[Tensor, Tensor], form: dict[str, Any], chunk: int, seed: int
) -> None:
    features, ids = given_set
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    results = []
    for rows, of, size in ((slice(None), ids, None), (slice(None), ids, chunk), (order, ids[order], None)):
        leaf = features.clone().requires_grad_()
        loss = image_aware_contrastive_loss(leaf[rows], of, chunk_size=size, **form)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-9)
    assert results[0][0] >= 0 or form["form"] == "log_of_sum" or results[0][0] > -1e-9


@PROPERTY
@given(
    given_set=feature_sets(),
    form=FORMS,
    temperature=st.sampled_from([1e-3, 0.3, 1e3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_loss_and_gradient_are_finite_at_every_extreme(
    given_set: tuple[Tensor, Tensor], form: dict[str, Any], temperature: float, dtype: torch.dtype
) -> None:
    features, ids = given_set
    leaf = features.to(dtype).requires_grad_()
    loss = image_aware_contrastive_loss(leaf, ids, temperature=temperature, **form)
    pair = negative_cosine_similarity(leaf, leaf.flip(0))
    (loss + pair).backward()
    assert leaf.grad is not None
    assert loss.isfinite()
    assert -1 - 1e-6 <= pair <= 1 + 1e-6
    assert leaf.grad.float().isfinite().all() or dtype == torch.float16  # its largest number is 65,504


NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0\\:"), min_size=1, max_size=20)


@PROPERTY
@given(names=st.lists(NAMES.filter(lambda name: name not in (".", "..")), min_size=1, max_size=20))
def test_records_return_every_name(names: list[str]) -> None:
    records = Records(names, root="root")
    assert [records.path(index) for index in range(len(names))] == [Path("root") / name for name in names]


@PROPERTY
@given(
    shown=st.lists(st.sets(st.integers(1, 6)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_coco_reads_back_the_written_data_in_any_order(shown: list[set[int]], seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation
    images = [{"id": 100 - number, "file_name": f"{number}.jpg"} for number in range(len(shown))]
    categories = [{"id": number, "name": f"class {number}"} for number in shuffled(range(1, 7)).tolist()]
    boxes = [
        {"id": 10 * number + one, "image_id": 100 - number, "category_id": one}
        for number, categories_of_image in enumerate(shown)
        for one in categories_of_image
    ]
    boxes = [boxes[place] for place in shuffled(len(boxes))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("annotations", "val2017"):
            (root / name).mkdir()
        for image in images:
            (root / "val2017" / str(image["file_name"])).touch()
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
        records = read_coco(root, "val2017")
    assert records.classes == tuple(f"class {number}" for number in range(1, 7))
    assert records.image_ids.tolist() == [image["id"] for image in images]
    assert records.labels is not None
    assert [set((np.flatnonzero(row) + 1).tolist()) for row in records.labels] == shown


CLASS_NAMES = st.text(st.characters(whitelist_categories=["L", "N", "S"]), min_size=1, max_size=8).filter(
    lambda name: "|" not in name and name.strip() == name
)
LABELS = st.sampled_from([1, 0, -1])


@st.composite
def labelled_images(draw: st.DrawFn) -> tuple[list[str], list[list[int]]]:
    """Names of L classes in alphabetical order, and labels of images, at least one per class."""
    names = sorted(draw(st.sets(CLASS_NAMES, min_size=1, max_size=4)))
    rows = draw(st.lists(st.lists(LABELS, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    return names, [[1] * len(names), *rows]


@PROPERTY
@given(labelled=labelled_images(), kind=st.sampled_from(["csv", "jsonl"]))
def test_a_manifest_reads_back_the_written_data(labelled: tuple[list[str], list[list[int]]], kind: str) -> None:
    names, rows = labelled
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"train.{kind}"
        lines = []
        for number, row in enumerate(rows):
            (Path(folder) / f"{number}.jpg").touch()
            shown, unknown = ([name for name, label in zip(names, row, strict=True) if label == of] for of in (1, -1))
            lines.append({"path": f"{number}.jpg", "labels": shown, "unknown": unknown})
        with path.open("w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                table = csv.DictWriter(file, ["path", "labels", "unknown"])
                table.writeheader()
                table.writerows(
                    {key: "|".join(of) if isinstance(of, list) else of for key, of in line.items()} for line in lines
                )
            else:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        records = read_manifest(path)
    assert records.classes == tuple(names)
    assert records.labels is not None
    assert records.labels.tolist() == rows


@PROPERTY
@given(shown=st.lists(st.dictionaries(st.sampled_from(VOC_CLASSES), st.lists(st.booleans(), min_size=1)), min_size=1))
def test_voc_reads_back_the_written_data(shown: list[dict[str, list[bool]]]) -> None:
    """For each image: class → whether each of its objects is difficult."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "VOC2012"
        for below in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (folder / below).mkdir(parents=True)
        for number, of_image in enumerate(shown):
            objects = "".join(
                f"<object><name>{name}</name><difficult>{int(one)}</difficult></object>"
                for name, difficult in of_image.items()
                for one in difficult
            )
            (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{objects}</annotation>")
            (folder / "JPEGImages" / f"{number}.jpg").touch()
        (folder / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{n}\n" for n in range(len(shown))))
        records = read_voc(root)
    assert records.labels is not None
    for row, of_image in zip(records.labels, shown, strict=True):
        expected = {name: -1 if all(difficult) else 1 for name, difficult in of_image.items()}
        assert {VOC_CLASSES[column]: int(row[column]) for column in np.flatnonzero(row)} == expected


@PROPERTY
@given(targets=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=6), multi_hot=st.booleans())
def test_a_wrapped_data_set_returns_its_targets_and_pixels(targets: list[set[int]], multi_hot: bool) -> None:
    rows = [[int(column in shown) for column in range(6)] for shown in targets]
    pixels = [np.full((3, 2 + number, 3), number, np.uint8) for number in range(len(rows))]
    given_targets = rows if multi_hot else [sorted(shown) for shown in targets]
    kind: Any = "multi_hot" if multi_hot else "class_ids"
    records = read_dataset(list(zip(pixels, given_targets, strict=True)), list("abcdef"), target_kind=kind)
    assert records.labels is not None
    assert records.labels.tolist() == rows
    assert all(np.array_equal(records.image(index), one) for index, one in enumerate(pixels))
