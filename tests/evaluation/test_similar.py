"""Similar parts and similar images, on images with a known answer, and as files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torch import nn

from mlssl.cli import main
from mlssl.data.records import Records
from mlssl.drawing.similar import draw_similar, draw_similarities
from mlssl.evaluation.similar import block_similarities, find_similar, identical_files
from mlssl.views.grid import block_grid

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class MeanColour(nn.Module):
    """A backbone whose features are the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def normalize(self, images):
        return images.float() / 255


def picture(left, right, height=40, width=60):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = left, right
    return image


@pytest.fixture
def folder(tmp_path):
    """Images of two colours each."""
    colours = {"rg": (RED, GREEN), "rr": (RED, RED), "bb": (BLUE, BLUE), "br": (BLUE, RED)}
    for name, pair in colours.items():
        Image.fromarray(picture(*pair)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def records(folder):
    return Records(sorted(path.name for path in folder.glob("*.png")), root=folder)


def test_blocks_of_one_colour_are_similar_and_the_map_shows_where():
    image = picture(RED, BLUE)
    boxes = block_grid(40, 60, 1, 2, 0.0)
    found = block_similarities(MeanColour(), image, boxes, 32)
    assert found.blocks.tolist() == pytest.approx(np.eye(2), abs=1e-5)
    left, right = found.maps[0, :, :10], found.maps[0, :, -10:]
    assert left.min() > 0.99
    assert right.max() < 0.01
    assert found.maps.isfinite().all()


def test_an_image_smaller_than_the_patches_is_accepted():
    found = block_similarities(MeanColour(), np.full((3, 5, 3), 90, np.uint8), block_grid(3, 5), 32)
    assert found.maps.shape[:1] == (4,)
    assert found.maps.isfinite().all()


def test_the_nearest_image_and_block_are_found(records):
    whole = find_similar(MeanColour(), picture(RED, RED), records, 2, size=32)
    assert records.path(whole.indices[0]).stem == "rr"
    assert whole.cosines == sorted(whole.cosines, reverse=True)
    grid = {"rows": 1, "cols": 2, "overlap": 0.0}
    block = find_similar(MeanColour(), picture(BLUE, RED), records, 4, block=0, size=32, **grid)
    stems = [records.path(index).stem for index in block.indices]
    assert set(stems[:2]) == {"bb", "br"}
    assert block.boxes[stems.index("br")].left == 0
    assert block.cosines[:2] == pytest.approx([1, 1])


def test_the_query_is_left_out_and_k_is_limited_to_the_images(records):
    found = find_similar(MeanColour(), records.image(0), records, 99, leave_out=0, size=32)
    assert sorted(found.indices) == [1, 2, 3]


def test_pictures_are_written(records, tmp_path):
    image, boxes = picture(RED, BLUE), block_grid(40, 60)
    alike = block_similarities(MeanColour(), image, boxes, 32)
    figure = draw_similarities(image, boxes, alike, tmp_path / "a.png", "title")
    drawn = [one for axes in figure.axes for one in axes.images if one.get_array().ndim == 2]
    table_and_maps = [one for one in drawn if one.get_cmap().name == "viridis"]
    assert len(table_and_maps) == 1 + len(boxes)
    assert len({one.get_clim() for one in table_and_maps}) == 1, "one scale"
    assert all(one.get_alpha() < 0.5 for one in table_and_maps[1:]), "the photograph is seen through"
    found = find_similar(MeanColour(), image, records, 3, block=1, size=32)
    remarks = ["", "identical to number 1", ""]
    figure = draw_similar(image, boxes[1], records, found, tmp_path / "b.png", "image", remarks)
    assert [text.get_text() for axes in figure.subfigs[1].axes for text in axes.texts] == ["identical to number 1"]
    assert [axes.get_title() for axes in figure.subfigs[0].axes] == ["query\nimage"]
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as written:
            assert min(written.size) > 150


def test_identical_files_are_reported(folder):
    for copy, of in (("query", "rr"), ("a", "rr"), ("b", "bb")):
        (folder / f"{copy}.png").write_bytes((folder / f"{of}.png").read_bytes())
    records = Records(["a.png", "bb.png", "br.png", "b.png"], root=folder)
    remarks = identical_files(folder / "query.png", records, [0, 1, 2, 3])
    assert remarks == ["identical to the query", "", "", "identical to number 2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0 was given: pass at least 1"),
        ({"block": 4}, "block=4 was given, but a grid of 2 × 2 has blocks 0 to 3"),
        ({"block": -1}, "block=-1 was given"),
    ],
)
def test_invalid_searches_are_reported(settings, message, records):
    with pytest.raises(ValueError, match=message):
        find_similar(MeanColour(), picture(RED, RED), records, **settings)


def test_a_folder_with_only_the_query_is_refused(records):
    with pytest.raises(ValueError, match="no image other than the query"):
        find_similar(MeanColour(), records.image(0), records.subset([0]), leave_out=0)


def test_the_commands_draw_files(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ["--backbone", "test_resnet", "--size", "32"]
    assert main(["neighbors", "rg.png", ".", "--k", "2", "--block", "0", "-o", "out/n.png", *words]) == 0
    assert main(["views", "rg.png", "-o", "out/v.png", *words]) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["n.png", "v-alike.png", "v.png"]
    printed = capsys.readouterr().out
    assert "rg.png and its 2 most similar images of 4" in printed
    assert "test_resnet is untrained" in printed
    assert "rg.png\n" not in printed  # the image is not its own neighbour
    assert main(["neighbors", "rg.png", ".", "--block", "9", *words]) == 2
