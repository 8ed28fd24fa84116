"""Generated scenes: several shapes of several classes per image, on a faint, noisy background.

A class is a shape, never a colour: objects and background patches have random colours, so that only the set of shapes
is common to all blocks of a scene. Nothing is stored: a scene is drawn on demand from (seed, split, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlssl.data.decoding import ImageArray
from mlssl.data.records import Records

SPLITS = ("train", "test")
MAX_CLASSES = 3  # per scene
CELLS = 3  # objects lie near the centres of CELLS × CELLS cells
NUM_OBJECTS = 9
NUM_DISTRACTORS = 3
RADIUS = (0.12, 0.17)  # of an object, in image sides
BACKGROUND = (
    88,
    168,
)  # colour range; with more contrast the background identifies scenes, and the shapes are not learned

_STREAM = 5379  # separates the random stream of a scene from that of its views, also seeded with seed and index

_Points = npt.NDArray[np.float64]


def synthetic_scenes(split: str = "train", *, size: int = 128, seed: int = 0, count: int = 2000) -> Records:
    """Make records of generated scenes, each with 1–3 of 12 shapes, each shape several times.

    Args:
        split: "train" or "test": different scenes, even for one seed.
        size: Height and width in pixels, at least 32.
        seed: Seed ≥ 0; each seed gives different scenes.
        count: Number of scenes n. The first scenes do not depend on it.

    Returns:
        Labelled records; their paths name scenes, not files.

    Raises:
        ValueError: The split is unknown, or size, seed or count is below its minimum.

    >>> records = synthetic_scenes("test", size=64, count=3)
    >>> records.image(2).shape, len(records.classes)
    ((64, 64, 3), 12)
    """
    if split not in SPLITS:
        raise ValueError(f"there are no synthetic scenes of split {split!r}: use 'train' or 'test'")
    for name, value, least in (("size", size, 32), ("seed", seed, 0), ("count", count, 1)):
        if value < least:
            raise ValueError(f"synthetic scenes with {name} = {value} were requested: use {name} >= {least}")
    labels = np.zeros((count, len(SHAPES)), dtype=np.int8)
    for index in range(count):
        labels[index, _choose_classes(_generator(seed, split, index))] = 1
    names = [f"{split}/{index:06d}" for index in range(count)]
    return Records(names, labels, tuple(SHAPES), decode=_Drawing(seed, size))


@dataclass(frozen=True)
class _Drawing:
    """Draws the scene that a path names; used in place of a file decoder."""

    seed: int
    size: int

    def __call__(self, path: Path) -> ImageArray:
        generator = _generator(self.seed, path.parent.name, int(path.name))
        classes = _choose_classes(generator)
        return _draw(generator, classes, self.size)


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([_STREAM, seed, SPLITS.index(split), index])


def _choose_classes(generator: np.random.Generator) -> npt.NDArray[np.int64]:
    return generator.permutation(len(SHAPES))[: generator.integers(1, MAX_CLASSES + 1)]


def _draw(generator: np.random.Generator, classes: npt.NDArray[np.int64], size: int) -> ImageArray:
    import cv2  # sets LD_LIBRARY_PATH, which importing the package should not

    image = _background(generator, size)
    for _ in range(NUM_DISTRACTORS):
        blob = generator.uniform(0.3, 1.0, (6, 1)) * _circle(6)
        _fill(image, generator, [blob], generator.uniform(0, 1, 2), generator.uniform(0.02, 0.07))
    shapes = list(SHAPES.values())
    cells = generator.permutation(CELLS * CELLS)[:NUM_OBJECTS]
    for turn, cell in enumerate(cells):
        centre = (np.array(divmod(cell, CELLS)) + 0.5 + generator.uniform(-0.25, 0.25, 2)) / CELLS
        _fill(image, generator, shapes[classes[turn % len(classes)]], centre, generator.uniform(*RADIUS))
    noise = generator.integers(0, 25, image.shape, dtype=np.uint8)
    return np.asarray(cv2.subtract(cv2.add(image, noise), 12), dtype=np.uint8)


def _background(generator: np.random.Generator, size: int) -> ImageArray:
    import cv2

    coarse = generator.integers(*BACKGROUND, (5, 5, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _fill(
    image: ImageArray, generator: np.random.Generator, contours: list[_Points], centre: _Points, radius: float
) -> None:
    """Fill contours by the even-odd rule, randomly turned, squeezed and coloured; centre and radius in image sides."""
    import cv2

    angle = generator.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.diag([1.0, generator.uniform(0.75, 1.0)])
    colour = [int(value) for value in generator.integers(0, 256, 3)]
    scale = len(image) * 2**_SHIFT
    points = [np.rint((contour @ squeeze @ turn.T * radius + centre) * scale).astype(np.int32) for contour in contours]
    cv2.fillPoly(image, points, colour, lineType=cv2.LINE_AA, shift=_SHIFT)


_SHIFT = 4  # cv2 takes coordinates in 1/16 pixel


def _circle(count: int = 24, radius: float = 1.0, x: float = 0.0, y: float = 0.0, start: float = 0.0) -> _Points:
    angles = start + np.arange(count) * 2 * np.pi / count
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> _Points:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _star() -> _Points:
    return _circle(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _crescent() -> _Points:
    outer, inner = np.linspace(0.75, 2 * np.pi - 0.75, 20), np.linspace(2 * np.pi - 1.15, 1.15, 16)
    return np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([0.33 + 0.8 * np.cos(inner), 0.75 * np.sin(inner)], axis=1),
        ]
    )


def _cross(arm: float = 0.3) -> _Points:
    corner = np.array([(1, -arm), (1, arm), (arm, arm)])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


def _zigzag() -> _Points:
    x = np.linspace(-1, 1, 7)
    y = np.where(np.arange(7) % 2, 0.45, -0.45)
    return np.concatenate([np.stack([x, y - 0.25], axis=1), np.stack([x, y + 0.25], axis=1)[::-1]])


# Unit-circle outlines; a class is a list of contours, and where two overlap there is a hole.
SHAPES: dict[str, list[_Points]] = {
    "disc": [_circle(radius=0.85)],
    "ring": [_circle(), _circle(radius=0.6)],
    "triangle": [_circle(3)],
    "square": [_circle(4)],
    "star": [_star()],
    "cross": [_cross()],
    "crescent": [_crescent()],
    "arrow": [np.array([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)])],
    "stripes": [_box(-0.9, y, 0.9, y + 0.26) for y in (-0.9, -0.38, 0.14, 0.66)],
    "dots": [_circle(12, 0.26)] + [_circle(12, 0.26, *centre) for centre in _circle(6, 0.74)],
    "checkers": [
        _box(x, y, x + 0.56, y + 0.56)
        for x, y in ((-0.84, -0.84), (0.28, -0.84), (-0.28, -0.28), (-0.84, 0.28), (0.28, 0.28))
    ],
    "zigzag": [_zigzag()],
}
