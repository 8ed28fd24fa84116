"""A tagger: the same labels after saving, maps whose mean is the logit, and changed files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mlssl.backbones import build_backbone
from mlssl.data.datasets import ImageDataset
from mlssl.data.records import Records
from mlssl.evaluation.features import Features, image_features
from mlssl.evaluation.protocols import PROTOCOLS
from mlssl.tagging.fit import certainty, check_saving, fit_tagger, held_out_logits
from mlssl.tagging.tagger import Tagger
from mlssl.tagging.thresholds import NEVER
from mlssl.weights.sources import DIGEST, Backbone, digest

CLASSES = ("bright", "dark", "red", "never seen")
SIZE = (32, 48)


def photographs(count: int, seed: int = 0) -> tuple[list[np.ndarray], torch.Tensor]:
    """Images that are bright or dark, some of them red, and their labels."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        bright, red = rng.random() < 0.5, rng.random() < 0.3
        pixels = rng.integers(0, 60, (40, 50, 3)) + (180 if bright else 10)
        pixels[..., 1:] = pixels[..., 1:] // (3 if red else 1)
        images.append(pixels.astype(np.uint8))
        labels.append([bright, not bright, red, False])
    return images, torch.tensor(labels, dtype=torch.int8)


def made(backbone: str = "test_resnet", pooling: Any = "avg", **settings: Any) -> Tagger:
    torch.manual_seed(0)
    model = Backbone(build_backbone(backbone)).frozen()
    images, labels = photographs(60)
    dataset = ImageDataset(Records([f"{n}.jpg" for n in range(60)], decode=lambda path: images[int(path.stem)]), SIZE)
    pixels = torch.stack([dataset[n]["image"] for n in range(60)])
    with torch.no_grad():
        features = image_features(model.backbone, model.normalize, pixels, pooling)
    train = Features(features, labels, torch.arange(60))
    return fit_tagger(model, train, CLASSES, size=SIZE, pooling=pooling, strength=0.01, **settings)


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return made()


@pytest.fixture(scope="module")
def saved(tagger: Tagger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tagger.safetensors"
    tagger.save(path)
    return path


def test_it_labels_new_images_most_probable_first(tagger: Tagger) -> None:
    images, labels = photographs(40, seed=1)
    found = tagger(images)
    assert found.probabilities.shape == (40, 4)
    right = (found.probabilities[:, :3] > tagger.thresholds.values[:3]) == labels[:, :3].bool()
    assert right.float().mean() > 0.9
    for names, row in zip(found.labels, found.probabilities.tolist(), strict=True):
        assert names == sorted(names, key=lambda name: -row[CLASSES.index(name)])
    assert tagger.thresholds.values[3] == NEVER
    assert "never seen" not in {name for names in found.labels for name in names}
    assert tagger([]).labels == []


def test_a_saved_tagger_gives_the_same_labels_and_contains_the_backbone(tagger: Tagger, saved: Path) -> None:
    loaded = Tagger.load(saved)
    images, _ = photographs(5, seed=2)
    one, other = tagger(images), loaded(images)
    assert one.labels == other.labels
    torch.testing.assert_close(one.probabilities, other.probabilities)
    assert (loaded.classes, loaded.size, loaded.about) == (CLASSES, SIZE, tagger.about)
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    with pytest.raises(FileExistsError, match="exists, and nothing in it was changed"):
        tagger.save(saved)
    tagger.save(saved, overwrite=True)


def test_the_mean_of_a_map_is_the_logit_with_average_pooling(tagger: Tagger) -> None:
    images, _ = photographs(3, seed=3)
    maps = torch.stack(tagger.maps(images))
    probabilities = tagger(images).probabilities
    torch.testing.assert_close(tagger.network.calibration(maps.mean((2, 3))), probabilities, rtol=1e-4, atol=1e-4)


def test_a_map_localises_a_label() -> None:
    tagger = made()
    tagger.size = (320, 320)
    half = np.full((320, 320, 3), 20, np.uint8)
    half[:, 160:] = 220
    (of_labels,) = tagger.maps([half])
    bright = of_labels[CLASSES.index("bright")]
    middle = bright.shape[1] // 2
    assert bright[:, middle + 1 :].mean() > bright[:, : middle - 1].mean()


@pytest.mark.parametrize("pooling", ["avgmax", "max"])
def test_other_poolings_match_those_of_the_features(pooling: str) -> None:
    tagger = made(pooling=pooling)
    images, labels = photographs(20, seed=4)
    assert ((tagger(images).probabilities > 0.5)[:, :2] == labels[:, :2].bool()).float().mean() > 0.8


def test_every_image_is_scored_by_a_classifier_not_trained_on_it() -> None:
    torch.manual_seed(0)
    noise = Features(torch.randn(60, 200), (torch.rand(60, 2) < 0.5).to(torch.int8), torch.arange(60))
    held = held_out_logits(noise, 1e-3, pos_weight=1.0, seed=0)
    right = ((held > 0) == (noise.labels == 1)).float().mean()
    assert 0.3 < right < 0.7, "noise that is remembered would be right nearly always"


def test_it_reports_the_uncertainty_of_its_thresholds(tagger: Tagger) -> None:
    first, *rest = certainty(tagger)
    assert "thresholds by best F1, chosen on held-out parts of 60 training images; their 90 % intervals have" in first
    assert rest == ["never predicted, without positive or negative images or the precision: 1 labels (never seen)"]
    tagger.thresholds.positives[2] = 4
    assert "uncertain, with fewer than 10 positive images: 1 labels (red)" in certainty(tagger)
    assert "thresholds by precision 0.9" in certainty(made(precision=0.9))[0]


def test_invalid_images_are_refused(tagger: Tagger) -> None:
    with pytest.raises(TypeError, match=r"image 1 is not uint8 of shape \(H, W, 3\)"):
        tagger([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 3))])
    with pytest.raises(TypeError, match=r"image 0 is not .* but Image: pass numpy.asarray\(image.convert\('RGB'\)\)"):
        tagger([Image.new("RGB", (9, 9))])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="image 0 has 4 channels, but the backbone takes 3"):
        tagger([np.zeros((9, 9, 4), np.uint8)])


def test_a_tagger_needs_labels_and_a_backbone_with_a_name(tagger: Tagger, tmp_path: Path) -> None:
    model = tagger.network.model
    with pytest.raises(ValueError, match="needs at least two labelled training images"):
        fit_tagger(
            model, Features(torch.zeros(3, 4), None, torch.arange(3)), ["a"], size=SIZE, pooling="avg", strength=1.0
        )
    name, model.name = model.name, None
    with pytest.raises(ValueError, match="was not built by name, but a tagger's file names it"):
        tagger.save(tmp_path / "a.safetensors")
    model.name = name


def changed(path: Path, target: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> Path:
    """The file with another header or tensors, and a matching checksum."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    change(header, tensors)
    header[DIGEST] = digest(tensors)
    save_file(tensors, target, header)
    return target


def entry(name: str, value: Any) -> Callable[..., None]:
    return lambda header, tensors: header.update({name: json.dumps(value)})


def tensor(name: str, value: torch.Tensor) -> Callable[..., None]:
    return lambda header, tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: header.pop("tagger"), "is not a tagger: pass a file written by mlssl linear --save"),
        (
            lambda header, tensors: header.update(tagger="2"),
            "is a tagger of version '2', but this mlssl reads version 1",
        ),
        (lambda header, tensors: header.pop("classes"), "entry 'classes' in the header"),
        (lambda header, tensors: header.update(size="{"), "entry 'size' in the header"),
        (entry("classes", []), r"contains classes \[\], which is invalid"),
        (entry("classes", "abcd"), "contains classes 'abcd', which is invalid"),
        (entry("classes", ["a", "a", "b", "c"]), "classes 0 and 1 are both named 'a'"),
        (entry("size", [32, 10**9]), r"contains size \[32, 1000000000\], which is invalid"),
        (entry("size", [32]), r"contains size \[32\]"),
        (entry("pooling", "os.system"), "contains pooling 'os.system'"),
        (entry("calibration", [float("nan"), 0.0]), "contains calibration"),
        (entry("calibration", [-1.0, 0.0]), "contains calibration"),
        (entry("about", []), r"contains about \[\]"),
        (entry("arguments", {"class_path": "os.system"}), "class_path"),
        (entry("arguments", {"pretrained": True}), "may cause a download"),
        (lambda header, tensors: header.update(backbone="hf-hub:timm/resnet18"), "may cause a download"),
        (lambda header, tensors: tensors.pop("classifier.bias"), "contains nothing as classifier.bias"),
        (tensor("classifier.bias", torch.zeros(5)), r"contains torch.float32 of shape \(5,\) as classifier.bias"),
        (tensor("classifier.bias", torch.zeros(4).double()), "contains torch.float64"),
        (tensor("thresholds.values", torch.full((4,), torch.nan)), "but finite torch.float32 of shape"),
        (tensor("features.mean", torch.zeros(())), r"as features.mean, but finite torch.float32 of shape \(0,\)"),
        (tensor("backbone.conv1.0.weight", torch.zeros(1)), "do not fit the backbone 'test_resnet'"),
    ],
)
def test_an_invalid_file_is_refused(change: Callable[..., None], message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Tagger.load(changed(saved, tmp_path / "t.safetensors", change))


def test_a_classifier_of_another_width_is_refused(saved: Path, tmp_path: Path) -> None:
    def widen(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {"features.mean": torch.zeros(7), "features.scale": torch.ones(7)}
        tensors["classifier.weight"] = torch.zeros(4, 7)

    with pytest.raises(ValueError, match="classifier for features of width 7, but its backbone's have width 96"):
        Tagger.load(changed(saved, tmp_path / "t.safetensors", widen))


def test_a_missing_or_damaged_file_is_reported(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tagger 'nowhere"):
        Tagger.load("nowhere.safetensors")
    damaged = tmp_path / "t.safetensors"
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, the checksum in its header"):
        Tagger.load(damaged)


@pytest.mark.parametrize(
    ("path", "precision", "sources", "protocol", "message"),
    [
        (None, 0.9, ["a"], None, "precision=0.9 was given, which only a tagger uses: pass --save"),
        (Path("a.pt"), None, ["a"], None, "does not end in .safetensors"),
        (Path("a.safetensors"), None, ["a", "b"], None, "a tagger has one backbone, but 2 were given"),
        (
            Path("a.safetensors"),
            None,
            ["a"],
            PROTOCOLS["voc07-svm"],
            "voc07-svm does not fit a classifier that can be saved",
        ),
        (Path("a.safetensors"), 2.0, ["a"], PROTOCOLS["corel5k"], "pass a fraction above 0"),
    ],
)
def test_a_tagger_that_cannot_be_saved_is_refused_before_any_work(path, precision, sources, protocol, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_saving(path, precision, sources, protocol)
