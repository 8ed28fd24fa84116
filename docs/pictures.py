"""Draw the pictures of the documentation: `python docs/pictures.py docs/_static`.

The "photograph" is drawn too, so that everything here may be passed on.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mlssl.drawing.views import COLOURS, draw_view_grid
from mlssl.views.blocks import BlockViews
from mlssl.views.grid import block_grid

HEIGHT, WIDTH = 360, 540
PAIRS = ("#e9ecef", "#495057", "#2b8a3e", "#8ce99a", "#ffc9c9")
"""Of no pair, itself, the same block, the same image, another image."""


def scene(night: bool = False) -> np.ndarray:
    """A street with a house, a tree, a car and the sun, or the same place by night with other things, RGB uint8."""
    sky = (
        np.linspace((20, 24, 60), (60, 50, 90), HEIGHT)
        if night
        else np.linspace((120, 180, 235), (220, 235, 250), HEIGHT)
    )
    image = np.ascontiguousarray(np.repeat(sky[:, None], WIDTH, 1).astype(np.uint8))
    line = {"lineType": cv2.LINE_AA}
    cv2.rectangle(image, (0, 225), (WIDTH, HEIGHT), (60, 90, 60) if night else (120, 175, 90), -1)
    cv2.rectangle(image, (0, 285), (WIDTH, HEIGHT), (50, 50, 58) if night else (105, 105, 112), -1)
    for left in range(10, WIDTH, 90):
        cv2.rectangle(image, (left, 318), (left + 45, 324), (235, 235, 225), -1)
    if night:
        cv2.circle(image, (120, 75), 38, (240, 235, 200), -1, **line)
        for x, y in ((220, 50), (300, 90), (400, 40), (480, 95), (350, 30)):
            cv2.circle(image, (x, y), 3, (255, 255, 255), -1, **line)
        boat = np.array([(330, 230), (500, 230), (470, 275), (360, 275)])
        cv2.fillPoly(image, [boat], (140, 60, 60), **line)
        cv2.fillPoly(image, [np.array([(415, 80), (415, 222), (490, 222)])], (230, 230, 235), **line)
        cv2.rectangle(image, (60, 160), (75, 300), (90, 90, 100), -1)
        cv2.circle(image, (67, 155), 18, (255, 220, 120), -1, **line)
        return image
    cv2.circle(image, (455, 70), 40, (255, 205, 60), -1, **line)
    cv2.rectangle(image, (60, 120), (230, 265), (205, 120, 90), -1)
    cv2.fillPoly(image, [np.array([(40, 125), (145, 45), (250, 125)])], (120, 60, 60), **line)
    for left in (85, 170):
        cv2.rectangle(image, (left, 150), (left + 38, 190), (190, 220, 240), -1)
        cv2.rectangle(image, (left, 150), (left + 38, 190), (255, 255, 255), 3)
    cv2.rectangle(image, (128, 200), (163, 265), (90, 60, 40), -1)
    cv2.rectangle(image, (372, 170), (392, 270), (110, 75, 45), -1)
    for x, y, radius in ((382, 135, 48), (345, 165, 36), (420, 165, 36)):
        cv2.circle(image, (x, y), radius, (50, 130, 60), -1, **line)
    cv2.fillPoly(image, [np.array([(290, 290), (315, 250), (410, 250), (440, 290)])], (60, 90, 190), **line)
    cv2.rectangle(image, (260, 285), (475, 325), (70, 105, 215), -1)
    for x in (305, 430):
        cv2.circle(image, (x, 326), 20, (30, 30, 34), -1, **line)
        cv2.circle(image, (x, 326), 9, (190, 190, 195), -1, **line)
    return image


def views(path: Path) -> None:
    """The scene, its blocks, its eight views."""
    image = scene()
    cut = BlockViews(size=160)
    draw_view_grid(image, cut(image, np.random.default_rng(4)), cut.boxes(HEIGHT, WIDTH), path)


def pairs(path: Path) -> None:
    """Which of the views of two images attract and which repel each other, as one loss sees them."""
    kinds = np.full((16, 16), 4)
    for row, column in np.ndindex(16, 16):
        if row == column:
            kinds[row, column] = 1
        elif row // 8 == column // 8:
            kinds[row, column] = 2 if row % 4 == column % 4 else 3
    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=(1.7, 1))
    axes.imshow(kinds, cmap=ListedColormap(PAIRS), vmin=0, vmax=4)
    axes.set_xticks(np.arange(-0.5, 16), [""] * 17)
    axes.set_yticks(np.arange(-0.5, 16), [""] * 17)
    axes.grid(color="white", linewidth=1.2)
    axes.tick_params(length=0)
    for place in range(16):
        colour = COLOURS[place % 4]
        axes.text(place, -0.9, str(place % 4), color=colour, ha="center", va="center", fontsize=9, fontweight="bold")
        axes.text(-1.0, place, str(place % 4), color=colour, ha="center", va="center", fontsize=9, fontweight="bold")
    for start, name in ((0, "street"), (8, "boat")):
        axes.text(start + 3.5, -2.9, f"image “{name}”", ha="center", fontsize=10)
        for branch in (0, 1):
            axes.text(start + 1.5 + 4 * branch, -1.8, f"branch {branch}", ha="center", fontsize=8, color="#495057")
    for start in (0, 8):
        axes.add_patch(Rectangle((start - 0.5, start - 0.5), 8, 8, fill=False, edgecolor="#212529", linewidth=2))
    for side in axes.spines.values():
        side.set_visible(False)
    key.set_axis_off()
    key.set(xlim=(0, 1), ylim=(0, 1))
    words = (
        (PAIRS[2], "same block: attract most", "both terms pull, the pair term\nand the image-aware term"),
        (PAIRS[3], "same image, other block: attract", "the image-aware term pulls\nthe eight views together"),
        (PAIRS[4], "other image: repel", "they stand in the denominator\nof the image-aware term"),
        (PAIRS[1], "a view and itself: not compared", ""),
    )
    for place, (colour, title, text) in enumerate(words):
        y = 0.93 - 0.2 * place
        key.add_patch(Rectangle((0, y - 0.03), 0.1, 0.07, color=colour))
        key.text(0.15, y + 0.005, title, fontsize=9.5, fontweight="bold", va="center")
        key.text(0.15, y - 0.045, text, fontsize=8.5, va="top", color="#495057")
    for left, name, night in ((0.0, "street", False), (0.52, "boat", True)):
        inset = key.inset_axes((left, -0.06, 0.46, 0.2))
        inset.imshow(scene(night))
        inset.set_axis_off()
        inset.set_title(name, fontsize=8.5, color="#495057", pad=2)
    figure.savefig(path, dpi=110, facecolor="white")


def grids(path: Path) -> None:
    """The blocks of one picture under several overlaps and grids."""
    image = scene()
    settings = ((2, 2, 0.0), (2, 2, 0.2), (2, 2, 0.3), (1, 2, 0.2), (3, 3, 0.1), (1, 1, 0.0))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, (rows, cols, overlap) in zip(figure.subplots(2, 3).flat, settings, strict=True):
        axes.imshow(image, alpha=0.75)
        boxes = block_grid(HEIGHT, WIDTH, rows, cols, overlap)
        for number, box in enumerate(boxes):
            colour, inset = COLOURS[number % len(COLOURS)], 4 * (number % 4)
            corner = (box.left + inset, box.top + inset)
            size = (box.width - 2 * inset - 1, box.height - 2 * inset - 1)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2))
        side, area = boxes[0].width / WIDTH, boxes[0].height * boxes[0].width / (HEIGHT * WIDTH)
        axes.set_title(f"{rows} × {cols}, overlap {overlap:g}: width {side:.0%}, area {area:.0%}", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=100, facecolor="white")


def time_to_quality(path: Path) -> None:
    """The mAP of Corel-5K over the seconds that two ways have trained, a line a seed."""
    rows = json.loads((Path(__file__).parent / "_static" / "time_to_quality.json").read_text())
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for way, colour, name in (("author", "#868e96", "the author's way"), ("ours", "#1971c2", "mlssl")):
        for seed in (0, 1, 2):
            line = [row for row in rows if row["way"] == way and row["seed"] == seed]
            minutes = [row["processor_s"] / 60 for row in line]
            label = f"{name}, three seeds" if seed == 0 else None
            axes.plot(minutes, [row["mAP"] for row in line], "o-", color=colour, markersize=3, label=label)
    axes.axhline(0.38, color="#212529", linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes of training on one core", ylabel="mAP of a linear probe, Corel-5K", xlim=0)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, facecolor="white")


DRAWN = {"views.png": views, "pairs.png": pairs, "grids.png": grids, "time_to_quality.png": time_to_quality}


def main(folder: Path) -> None:
    """Draw all of them."""
    for name, draw in DRAWN.items():
        draw(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
