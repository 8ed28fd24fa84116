"""The examples of transfer: detectors on drawn scenes in COCO's and VOC's layout, and fine-tuning on Corel-5K."""

from __future__ import annotations

import csv
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_export import trained

from mlssl import export_backbone
from mlssl.backbones import build_backbone
from mlssl.tagging.tagger import Tagger
from mlssl.weights.sources import open_backbone

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = [
    "--backbone", "test_resnet",
    "--batch_size", "2",
    "--min_sizes", "[64]",
    "--max_size", "96",
    "--num_workers", "0",
    "--milestones", "[100]",
    "--warmup", "0",
]  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*max_epochs:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of pycocotools, with NumPy 2
]


def run(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / name
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])  # as Python does for a script
    runpy.run_path(str(path), run_name="__main__")


def scene(index: int, side: int = 64) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """One bright square or bar on a dark ground, with its kind and box left, top, width, height."""
    rng = np.random.default_rng(index)
    kind = index % 2
    width, height = (24, 24) if kind == 0 else (36, 12)
    left, top = int(rng.integers(0, side - width)), int(rng.integers(0, side - height))
    image = rng.integers(0, 40, (side, side, 3), dtype=np.uint8)
    image[top : top + height, left : left + width] = (230, 60, 60) if kind == 0 else (60, 60, 230)
    return image, [(kind, [left, top, width, height])]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four test scenes in COCO's layout, with a crowd and an image without an object."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, count in (("train2017", 12), ("val2017", 4)):
        (root / split).mkdir()
        content: dict = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "bar"}],
        }
        for index in range(count):
            image, objects = scene(index)
            Image.fromarray(image).save(root / split / f"{index}.png")
            content["images"].append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
            for kind, (left, top, width, height) in objects[: 0 if index == 3 else None]:
                corners = [left, top, left + width, top, left + width, top + height, left, top + height]
                entry = {"image_id": index, "category_id": (7, 3)[kind], "bbox": [left, top, width, height]}
                content["annotations"].append(entry | {"id": index, "iscrowd": 0, "segmentation": [corners]})
        crowd = {"size": [64, 64], "counts": [64 * 32, 64 * 32]}
        entry = {"image_id": 0, "category_id": 7, "bbox": [32, 0, 32, 64], "iscrowd": 1, "segmentation": crowd}
        content["annotations"].append(entry | {"id": 99})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    return str(export_backbone(trained(build_backbone("test_resnet")), tmp_path / "ours.safetensors").path)


def losses(folder: Path) -> list[float]:
    (path,) = folder.rglob("metrics.csv")
    return [float(row["loss"]) for row in rows_of(path) if row.get("loss")]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "masks", "rows"), [("fpn", False, ["scratch", "ours"]), ("c4", True, ["ours"])])
def test_a_detector_learns_drawn_scenes_from_an_exported_file(
    head, masks, rows, drawn, weights, tmp_path, monkeypatch, capsys
) -> None:
    words = [*TINY, "--head", head, "--root", str(drawn), "--steps", "20", "--lr", "0.005", "--masks", str(masks)]
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    from detectors import Pyramid

    monkeypatch.setattr(Pyramid.__init__, "__defaults__", (32,))  # channels; 256 take minutes
    files = ", ".join({"scratch": "scratch", "ours": weights}[row] for row in rows)
    run("detection/train.py", [*words, "--weights", f"[{files}]", "--out", str(tmp_path / "out")], monkeypatch)
    table = capsys.readouterr().out.splitlines()[-2 - len(rows) :]
    columns = ["weights", "loss, first 10 steps", "last 10", "AP", "AP50", "AP75"] + ["mask AP"] * masks
    assert table[0] == f"| {' | '.join(columns)} |"
    assert [line.split()[1] for line in table[2:]] == rows
    assert all(0 <= float(number) <= 100 for line in table[2:] for number in re.findall(r"[\d.]+", line))
    for name, line in zip(rows, table[2:], strict=True):
        found = losses(tmp_path / "out" / name)
        assert found[-1] < found[0]
        first, last = (float(cell) for cell in line.split(" | ")[1:3])
        assert last < first


@pytest.mark.slow
def test_a_detector_trains_on_images_of_coco(coco256, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        content = json.loads((coco256 / "annotations" / f"instances_{split}.json").read_text())
        content["images"] = content["images"][:8]
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (tmp_path / split).symlink_to(coco256 / split)
    words = [*TINY, "--root", str(tmp_path), "--steps", "2", "--out", str(tmp_path / "out")]
    run("detection/train.py", words, monkeypatch)
    assert "scored on 8 images" in capsys.readouterr().out


def test_coco_is_read_with_masks_and_without_crowds_in_training(drawn, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    from data import read_coco

    train, test = (read_coco(str(drawn), "val2017", training, with_masks=True) for training in (True, False))
    assert (train.classes, len(train), len(test)) == (["bar", "square"], 3, 4)  # without the image of no object
    image, target = test[0]
    left, top, width, height = scene(0)[1][0][1]
    assert image.shape == (3, 64, 64)
    assert target["boxes"].tolist() == [[left, top, left + width, top + height], [32, 0, 64, 64]]
    assert target["labels"].tolist() == [2, 2]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["masks"].flatten(1).sum(1).tolist() == [width * height, 64 * 32]
    assert test[3][1]["boxes"].shape == (0, 4)
    monkeypatch.setattr("torch.rand", lambda *_: np.float32(0.0))  # flips
    flipped, mirrored = train[0]
    assert np.array_equal(flipped.numpy(), image.numpy()[:, :, ::-1])
    assert mirrored["boxes"].tolist() == [[64 - left - width, top, 64 - left, top + height]]
    inside = mirrored["masks"][0][top : top + height, 64 - left - width : 64 - left]
    assert inside.sum() == width * height


VOC_OBJECTS = (("cat", 0), ("tvmonitor", 1))


def test_voc_is_read_from_its_layout_with_difficult_objects_ignored(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    from data import read_voc

    folder = tmp_path / "VOC2007"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n")
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / "000001.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>10</xmax><ymax>30</ymax></bndbox>"
    one, other = (
        f"<object><name>{n}</name><difficult>{d}</difficult>{box}</object>" for n, d in (("cat", 0), ("tvmonitor", 1))
    )
    (folder / "Annotations" / "000001.xml").write_text(f"<annotation>{one}{other}</annotation>")
    _, target = read_voc(str(tmp_path), ["2007/trainval"], training=False)[0]
    assert target["boxes"].tolist() == [[0, 10, 10, 30]] * 2
    assert (target["labels"].tolist(), target["iscrowd"].tolist()) == ([8, 20], [0, 1])
    assert len(read_voc(str(tmp_path), ["2007/trainval"], training=True)[0][1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            ["--weights", "[gone.safetensors]"],
            FileNotFoundError,
            "No weights stand at gone.safetensors: give a file, or",
        ),
        (["--head", "c4", "--backbone", "test_vit"], ValueError, "head c4 takes a ResNet apart"),
        (["--dataset", "voc", "--masks", "true"], ValueError, "VOC's boxes come without masks"),
        (["--train_splits", "[a, b]"], ValueError, "COCO has one split at a time"),
    ],
)
def test_wrong_input_of_the_detector_is_reported(words, error, message, drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run("detection/train.py", ["--root", str(drawn), *TINY, *words], monkeypatch)


def test_a_loss_that_is_not_finite_stops_the_detector_with_advice(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    from train import DetectorTraining

    model = DetectorTraining(lambda *_: {"loss": torch.tensor(float("nan"))}, 0.1, 0, [], with_masks=False)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 0: lower lr, or warm up longer"):
        model.training_step(([], []), 0)


@pytest.mark.parametrize("name", ["coco_1x", "voc_24k"])
def test_a_schedule_names_arguments_of_the_example_and_the_literatures_numbers(name, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    from train import main

    config = yaml.safe_load((EXAMPLES / "detection" / f"{name}.yaml").read_text())
    assert config.keys() < inspect.signature(main).parameters.keys()
    schedule = {"coco_1x": (90000, [60000, 80000]), "voc_24k": (24000, [18000, 22000])}[name]
    assert (config["steps"], config["milestones"], config["batch_size"], config["lr"]) == (*schedule, 16, 0.02)


@pytest.fixture
def probing(monkeypatch):
    """Names in the example of the segmentation probe."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "detection"), *sys.path])
    return runpy.run_path(str(EXAMPLES / "detection" / "segmentation_probe.py"))


def test_masks_of_coco_have_small_objects_on_top_and_void_crowds(drawn, probing) -> None:
    masks = probing["read_coco_masks"](drawn, "val2017")
    assert (masks.classes, len(masks.paths)) == (["background", "bar", "square"], 4)
    for index in range(3):
        _, ((kind, (left, top, width, height)),) = scene(index)
        expected = np.zeros((64, 64), np.uint8)
        if index == 0:
            expected[:, 32:] = 255
        expected[top : top + height, left : left + width] = (2, 1)[kind]
        # A polygon through pixel corners contains their edges, as rounded by pycocotools.
        assert (masks.mask(index, 64, 64) != expected).mean() < 0.02
    assert not masks.mask(3, 64, 64).any()


def test_annotations_without_masks_are_refused_or_painted_as_boxes(drawn, probing, tmp_path) -> None:
    content = json.loads((drawn / "annotations" / "instances_val2017.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    number = len(content["annotations"])
    with pytest.raises(
        ValueError, match=rf"{number} of {number} annotations of .* have no segmentation, first id .*: "
    ):
        probing["read_coco_masks"](tmp_path, "val2017")
    masks = probing["read_coco_masks"](tmp_path, "val2017", boxes=True)
    _, ((kind, (left, top, width, height)),) = scene(1)
    expected = np.zeros((64, 64), np.uint8)
    expected[top : top + height, left : left + width] = (2, 1)[kind]
    assert (masks.mask(1, 64, 64) != expected).mean() < 0.02


def test_masks_of_voc_are_the_numbers_of_its_palette(tmp_path, probing) -> None:
    folder = tmp_path / "VOC2012"
    for name in ("ImageSets/Segmentation", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("a\n")
    numbers = np.array([[0, 8], [20, 255]], np.uint8)
    picture = Image.fromarray(numbers)
    picture.putpalette(list(range(256)) * 3)
    assert picture.mode == "P"
    picture.save(folder / "SegmentationClass/a.png")
    masks = probing["read_voc_masks"](tmp_path, "2012/val")
    assert masks.mask(0, 2, 2).tolist() == numbers.tolist()
    assert masks.classes[8] == "cat"
    with pytest.raises(
        ValueError, match=r"a.png has shape \(2, 2\) and values to 255: give numbers of VOC's 20 classes"
    ):
        masks.mask(0, 2, 3)


def test_the_miou_of_a_segmentation_probe_equals_a_manual_computation(probing) -> None:
    probe = probing["SegmentationProbe"](open_backbone("test_resnet"), 4, 0.1)
    found = torch.tensor([[0, 0, 1, 1], [2, 2, 1, 0]])
    masks = torch.tensor([[[0, 0, 1, 0], [2, 1, 255, 255]]])
    logits = torch.nn.functional.one_hot(found, 4).permute(2, 0, 1)[None].float()
    probe.iou(logits.argmax(1), masks)
    # Background 2 of 3, class 1 1 of 3, class 2 1 of 2; class 3 is nowhere, and the last two pixels do not count.
    assert probe.iou.compute().item() == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)
    maps = probe(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert maps.shape == (1, 4, 64, 96)
    assert [name for name, one in probe.named_parameters() if one.requires_grad] == ["head.1.weight", "head.1.bias"]


@pytest.mark.slow
def test_a_segmentation_probe_finds_drawn_squares_and_bars(drawn, weights, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--root", str(drawn), "--sources", f"[{weights}]", "--size", "192", "--num_workers", "0"]
    run("detection/segmentation_probe.py", [*words, "--epochs", "20", "--batch_size", "4", "--lr", "0.05"], monkeypatch)
    *_, row = capsys.readouterr().out.splitlines()
    name, score = row.strip("| ").split(" | ")
    assert name == weights
    assert float(score) > 35, "the background alone has an IoU of nine tenths, and a mean of three tenths"


def test_wrong_input_of_the_segmentation_probe_is_reported(drawn, tmp_path, monkeypatch) -> None:
    content = json.loads((drawn / "annotations" / "instances_val2017.json").read_text())
    content["categories"].append({"id": 99, "name": "other"})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    train = (drawn / "annotations" / "instances_train2017.json").read_text()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(train)
    with pytest.raises(ValueError, match="3 and 4 classes in the two splits: give the same to both"):
        run("detection/segmentation_probe.py", ["--root", str(tmp_path), "--sources", "[test_resnet]"], monkeypatch)


@pytest.fixture(scope="module")
def squares_and_bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training and eight test scenes as manifests."""
    root = tmp_path_factory.mktemp("manifest")
    for name, numbers in (("train", range(40)), ("val", range(40, 48))):
        rows = ["path,labels"]
        for index in numbers:
            image, ((kind, _),) = scene(index, 48)
            Image.fromarray(image).save(root / f"{index}.png")
            rows.append(f"{index}.png,{('square', 'bar')[kind]}")
        (root / f"{name}.csv").write_text("\n".join(rows))
    return root


def fine_tuning(root: Path, *sources: str) -> list[str]:
    words = [*sources, "--dataset", "manifest", "--root", str(root), "--eval_size", "32", "--batch_size", "8"]
    return [*words, "--num_workers", "0", "--epochs", "[5]", "--lrs", "[0.01, 0.03]", "--seeds", "2", "--ema", "0.5"]


@pytest.mark.slow
def test_fine_tuning_saves_the_best_for_tagging_and_for_timm_and_repeats_no_run(
    squares_and_bars, weights, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    words = fine_tuning(squares_and_bars, "test_resnet", weights)
    run("fine_tune.py", words, monkeypatch)
    table = capsys.readouterr().out
    rows = [line.split(" | ") for line in table.splitlines()[-4:]]
    assert [row[0].strip("| ") for row in rows] == ["test_resnet (untrained)"] * 2 + [weights] * 2
    assert [row[1] for row in rows] == ["linear probe", "fine-tuned"] * 2
    assert all(float(row[5].split()[0]) > 0.9 for row in rows if row[1] == "fine-tuned"), rows
    runs = [json.loads(line) for line in Path("fine_tuned/runs.jsonl").read_text().splitlines()]
    assert [(one["run"]["source"], one["run"]["seed"]) for one in runs] == [
        (source, seed) for source in ("test_resnet", weights) for seed in (0, 0, 1)
    ]
    for one in runs[2::3]:  # the rate of the first seed's best, by validation
        first = runs[:2] if one["run"]["source"] == "test_resnet" else runs[3:5]
        assert one["run"]["lr"] == max(first, key=lambda other: other["found"]["val_mAP"])["run"]["lr"]

    tagger = Tagger.load("fine_tuned/test_resnet-40.safetensors")
    network = timm.create_model("local-dir:fine_tuned/test_resnet-40", pretrained=True).eval()
    image, ((kind, _),) = scene(100, 32)
    probabilities = tagger([image]).probabilities
    assert tagger.classes == tuple(network.pretrained_cfg["label_names"]) == ("bar", "square")
    pixels = tagger.network.model.normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(network(pixels).sigmoid(), probabilities, rtol=1e-3, atol=1e-4)
    assert probabilities.argmax() == (1, 0)[kind]

    monkeypatch.setattr("lightning.Trainer.fit", lambda *_: pytest.fail("a run was repeated"))
    run("fine_tune.py", words, monkeypatch)
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--fractions", "[0.5, 1.0]"], ValueError, "2 fractions and 1 epochs were given: give epochs for each of"),
        (["--fractions", "[0.1]"], ValueError, "1 of 4 images are held out, and no label tells them apart: use more"),
        (["--val_split", ""], ValueError, "an evaluation needs labelled training and test images"),
    ],
)
def test_wrong_input_of_fine_tuning_is_reported_before_the_first_run(
    words, error, message, squares_and_bars, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run("fine_tune.py", [*fine_tuning(squares_and_bars, "test_resnet"), *words], monkeypatch)
    assert not Path("fine_tuned").exists()


@pytest.mark.parametrize("example", ["fine_tune.py", "detection/detectors.py"])
def test_a_published_file_with_its_classifier_is_a_row_that_trains_the_whole_network(
    example: str, tmp_path: Path
) -> None:
    published = timm.create_model("test_resnet", num_classes=7)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    names = runpy.run_path(str(EXAMPLES / example))
    if example == "fine_tune.py":
        source = open_backbone(f"test_resnet={tmp_path / 'published.pth'}")
        network = names["FineTuner"](source, 5, 0.1, 1.0, 0, "bce").model.backbone
    else:
        detector = names["build_detector"]("test_resnet", str(tmp_path / "published.pth"), 5, "fpn", False)
        network = detector.backbone.body
    assert torch.equal(network.layer4[0].conv1.weight, published.layer4[0].conv1.weight)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.modules())


def test_learning_rates_rise_with_depth_above_frozen_stages_and_losses_are_those_of_the_papers() -> None:
    from sklearn.metrics import log_loss

    names = runpy.run_path(str(EXAMPLES / "fine_tune.py"))
    tuner = names["FineTuner"](open_backbone("test_resnet"), 5, 0.1, 0.5, 1, "bce").train()
    tuner._trainer = type("T", (), {"estimated_stepping_batches": 10})()
    groups = tuner.configure_optimizers()["optimizer"].param_groups
    rate = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    network = tuner.model.backbone
    first, last, head = (
        rate[id(one)]
        for one in (network.layer1[0].conv1.weight, network.layer4[0].conv1.weight, tuner.classifier.weight)
    )
    assert first < last < head == pytest.approx(0.1)
    assert id(network.conv1[0].weight) not in rate, "the stem is held as it is"
    assert not network.bn1.training
    assert network.layer1.training
    logits, labels = torch.randn(6, 3), torch.tensor([[1, 0, 0], [0, 1, 0]] * 3)
    bce = sum(log_loss(labels[:, i], logits[:, i].sigmoid().numpy(), labels=[0, 1]) for i in range(3))
    assert names["bce_loss"](logits, labels).item() == pytest.approx(bce, rel=1e-5)
    from timm.loss import AsymmetricLossMultiLabel

    asymmetric = AsymmetricLossMultiLabel()(logits, labels)
    if "reduction" not in inspect.signature(AsymmetricLossMultiLabel).parameters:  # timm < 1.0.30 sums over images
        asymmetric = asymmetric / len(labels)
    assert names["asymmetric_loss"](logits, labels).item() == pytest.approx(asymmetric.item(), rel=1e-4)
    for loss in (names["bce_loss"], names["asymmetric_loss"]):  # unknown labels count for nothing
        unknown = torch.cat([labels, torch.full((6, 1), -1)], dim=1)
        torch.testing.assert_close(loss(torch.cat([logits, torch.randn(6, 1)], dim=1), unknown), loss(logits, labels))
