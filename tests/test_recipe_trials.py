"""The benchmark of recipes: a trial in small sizes, its row, its resume, the peers' losses, the page's table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "benchmarks"
NETWORK = {"backbone": "test_resnet", "projection_dim": 16, "predictor_dim": 8}
FILES = ("recipes", "recipes_own", "recipes_score", "recipes_page", "recipes_peers", "time_to_quality", "authors_way")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:.*train_dataloader.*does not have many"),
]


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("recipes")
    monkeypatch.setattr(script, "NETWORK", NETWORK)
    yield script
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """UC Merced's layout: two manifests."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 4)):
        for number in range(count):
            Image.effect_noise((24, 24), 20 + 60 * (number % 2)).save(folder / f"{split}{number}.jpg")
        lines = [f"{split}{number}.jpg,{('sea', 'sand')[number % 2]}" for number in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["path,labels", *lines]))
    return folder


def words(name: str, tiles: Path, tmp_path: Path) -> list[str]:
    change = ["data.size=32", "data.eval_size=32", "model.warmup_epochs=0.1"]
    files = ["--results", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path / "work"), "--save_every", "1"]
    run = ["--set", "ucmerced", "--root", str(tiles), "--batch_size", "20", "--views", "4", "--change", *change]
    return [name, *files, *run]


@pytest.mark.slow
def test_a_trial_is_a_row_that_resumes_and_is_not_run_twice(
    recipes: Any, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_in_the_third_step(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(recipes.Seconds, "on_train_batch_start", fail_in_the_third_step)
        with pytest.raises(RuntimeError, match="the power is gone"):
            recipes.main(words("mlssl", tiles, tmp_path))
    (last,) = (tmp_path / "work").glob("*/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    capsys.readouterr()
    assert recipes.main(words("mlssl", tiles, tmp_path)) == 0
    trained = torch.load(last.with_name("trained.ckpt"), weights_only=True)
    assert recipes.main(words("mlssl", tiles, tmp_path / "undisturbed")) == 0
    row, again = (recipes.rows_of(folder / "rows.jsonl")[0] for folder in (tmp_path, tmp_path / "undisturbed"))
    (whole,) = (tmp_path / "undisturbed" / "work").glob("*/trained.ckpt")
    assert torch.load(whole, weights_only=True)["global_step"] == trained["global_step"] == row["steps"] == 6
    for name, weight in torch.load(whole, weights_only=True)["state_dict"].items():
        assert torch.equal(weight, trained["state_dict"][name]), name
    assert row["views_per_image"] == 4
    assert 0 < row["cv_average"] <= 1
    assert row["cv_average"] == again["cv_average"]
    assert row["settings"]["model"]["optimizer"] == "muon"
    assert row["settings"]["data"]["branches"] == "overhead"
    assert not [key for key in row if key.startswith("test")]

    monkeypatch.setattr(recipes, "train", None)  # a third call trains nothing
    assert recipes.main(words("mlssl", tiles, tmp_path)) == 0
    assert "done before:" in capsys.readouterr().out


def test_what_an_image_costs(recipes: Any) -> None:
    blocks = {"rows": 2, "cols": 2, "size": 64}
    assert recipes.views_per_image(blocks, has_teacher=False) == 8
    assert recipes.views_per_image({**blocks, "size": 32}, has_teacher=False) == 2
    whole = {"rows": 1, "cols": 1, "size": 64}
    assert recipes.views_per_image(whole, has_teacher=True) == pytest.approx(2 + 2 / 3)
    crops = {**whole, "local_views": {"count": 6, "size": 40}}
    assert recipes.views_per_image(crops, has_teacher=False) == pytest.approx(2 + 6 * (40 / 64) ** 2)


def test_folds_are_the_same_and_contain_each_image_once(recipes: Any) -> None:
    folds = importlib.import_module("recipes_score").folds
    first, second = folds(23), folds(23)
    assert [len(one) for one in first] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(first).sort().values, torch.arange(23))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_fold_in_which_no_class_can_be_scored_is_refused(recipes: Any) -> None:
    score = importlib.import_module("recipes_score")
    features = score.Features(torch.randn(8, 4), torch.tensor([[1, 0]] * 8), torch.arange(8))
    varied = features._replace(labels=torch.tensor([[1, 0], [0, 1]] * 4))
    with pytest.raises(ValueError, match="a fold has no class that some of its images show and others do not"):
        score._scores("cv", [(varied, features)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["mlssl", "--root", ".", "--colours", "soft"], "--colours is for peers: pass 'soft', 'paper' or --change"),
        (["mlssl", "--root", ".", "--change", "lr=1"], "--change 'lr=1': pass data.NAME=VALUE or model.NAME=VALUE"),
    ],
)
def test_a_wrong_trial_is_refused(recipes: Any, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        recipes.main(more)


def test_a_trial_needs_a_name_and_a_folder(recipes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.main(["mlssl"])
    assert "pass a NAME and --root FOLDER, or --page FILE alone" in capsys.readouterr().err


def test_sets_of_blocks_are_means_of_features_and_the_target_has_no_gradient(recipes: Any) -> None:
    own = importlib.import_module("recipes_own")
    torch.manual_seed(0)
    network = recipes.network_of("sets", {**NETWORK, "contrastive_weight": 0.0})
    assert type(network) is own.SetsOfBlocks
    network.projector, network.predictor = torch.nn.Identity(), torch.nn.Identity()
    batch = {
        "views": torch.randint(0, 256, (3, 2, 4, 3, 32, 32), dtype=torch.uint8),
        "image_ids": torch.arange(3),
    }
    one, other = (network.eval().embed(views.flatten(0, 1)) for views in batch["views"].unbind(1))
    features = one.features.view(3, 4, -1)
    assert torch.allclose(one.pair_predictions.view(3, 6, -1)[:, 1], (features[:, 0] + features[:, 2]) / 2, atol=1e-6)
    assert torch.allclose(one.whole_projections, features.mean(1), atol=1e-6)

    def towards(anchors: torch.Tensor, wholes: torch.Tensor) -> torch.Tensor:
        return -torch.cosine_similarity(anchors.view(3, -1, wholes.shape[1]), wholes[:, None], dim=2).mean()

    expected = torch.stack(
        [
            towards(anchors, wholes)
            for sets, wholes in ((one, other.whole_projections), (other, one.whole_projections))
            for anchors in (sets.predictions, sets.pair_predictions)
        ]
    ).mean()
    weight, value = network.terms([one, other], batch)["pair"]
    assert (weight, value.item()) == (1.0, pytest.approx(expected.item(), abs=1e-6))
    for sets in (one, other):
        sets.whole_projections.retain_grad()
    sum(weight * value for weight, value in network.terms([one, other], batch).values()).backward()
    assert one.whole_projections.grad is None
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


@pytest.mark.parametrize("name", ["simclr", "mocov2", "simsiam", "byol", "barlow", "vicreg", "dino", "swav"])
@pytest.mark.filterwarnings("ignore")  # of lightly's imports
def test_a_peer_has_a_finite_loss_and_a_gradient_for_its_backbone(recipes: Any, name: str) -> None:
    pytest.importorskip("lightly", reason="the peers come from lightly: pip install 'mlssl[bench]'")
    peers = importlib.import_module("recipes_peers")
    torch.manual_seed(0)
    network = peers.PEERS[name](**NETWORK)
    batch = {
        "views": torch.randint(0, 256, (4, 2, 1, 3, 32, 32), dtype=torch.uint8),
        "local_views": torch.randint(0, 256, (4, peers.SMALL, 3, 24, 24), dtype=torch.uint8),
        "image_ids": torch.arange(4),
    }
    embeddings = [network.embed(views.flatten(0, 1)) for views in batch["views"].unbind(1)]
    ((weight, value),) = network.terms(embeddings, batch).values()
    assert value.shape == ()
    assert torch.isfinite(value)
    (weight * value).backward()
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())
    if network.has_teacher:
        assert not any(parameter.requires_grad for parameter in network.teacher.parameters())
    assert len(peers.COLOURS[name]) == 2


def test_the_page_contains_the_table_of_the_rows(recipes: Any, tmp_path: Path) -> None:
    page = importlib.import_module("recipes_page")
    rows = recipes.rows_of(FOLDER / "recipes.jsonl")
    text = (ROOT / "docs" / "which_recipe.md").read_text()
    assert f"{page.MARKS[0]}\n{page.table(rows)}\n{page.MARKS[1]}" in text
    scores = {"cv_average": 0.5, "cv_average_max": 0.4, "cv_knn": 0.3}
    row = {"name": "mlssl", "set": "corel5k", "views": 20, "changed": {}, **scores}
    changed = {**row, "name": "swav", "changed": {"lr": 1, "change": ["data.overlap=0"]}}
    other = {**changed, "changed": {"colours": "own"}, "cv_average": 0.9}
    lines = page.table([row, changed, other, {**row, "cv_average": 0.6}]).splitlines()
    assert lines[2] == "| Corel-5K | 20 | `mlssl` | 0.550 (2 seeds) | 0.400 (2 seeds) | 0.300 (2 seeds) |"
    assert sum(page.NOT_YET in line for line in lines) == len(lines) - 5
    assert lines[5] == "| Corel-5K | 20 | `swav`, colours own | 0.900 (1 seed) | 0.400 (1 seed) | 0.300 (1 seed) |"
    assert lines[6].startswith("| Corel-5K | 20 | `swav`, data.overlap=0, lr 1 | 0.500")
    assert page.table([{**row, "views": 5.0}]).splitlines()[2].startswith("| Corel-5K | 5 | `mlssl` | 0.500")
    copy = tmp_path / "page.md"
    copy.write_text(text)
    recipes.main(["--page", str(copy), "--results", str(FOLDER / "recipes.jsonl")])
    assert copy.read_text() == text
