"""Rotate the hue of 8-bit RGB images without converting to HSV."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class HueTurner:
    """Rotate the hue of images of one size, in reused buffers.

    The result equals HSV in real numbers, rounded once to 8 bits. (Pillow's operator, used by torchvision, rounds hue
    and saturation to 256 steps in between, with errors up to six.)

    A rotation keeps the largest channel value V and the smallest m. A rotation by d sixths of the circle, d ≤ 1, maps a
    channel x, followed by y and z on the circle, to x - max(0, y - z - e) + max(0, z - y - e), clipped to m–V, with e =
    (1 - d)·(V - m): x falls where y is the largest and rises where z is. In the other direction y and z swap. A
    rotation by thirds of the circle permutes the channels.

    Args:
        size: Side S of the images in pixels.
    """

    def __init__(self, size: int) -> None:
        self._planes = list(np.empty((13, size, size), np.uint8))

    def __call__(self, image: Pixels, turns: float, out: Pixels) -> Pixels:
        """Rotate by a fraction of the colour circle; a third turns red to green.

        Args:
            image: RGB (S, S, 3).
            turns: -1 to 1.
            out: RGB (S, S, 3), overwritten; may be the image.

        Returns:
            out.
        """
        given, plus_rest, turned = self._planes[:3], self._planes[3:6], self._planes[6:9]
        largest, smallest, rest, rise = self._planes[9:]
        cv2.split(image, given)
        thirds = round(3 * turns)
        sixths = 6 * turns - 2 * thirds
        given = given[-thirds % 3 :] + given[: -thirds % 3]
        cv2.max(cv2.max(given[0], given[1], dst=largest), given[2], dst=largest)
        cv2.min(cv2.min(given[0], given[1], dst=smallest), given[2], dst=smallest)
        cv2.convertScaleAbs(cv2.subtract(largest, smallest, dst=rest), dst=rest, alpha=1 - abs(sixths))
        for channel, sum_ in zip(given, plus_rest, strict=True):
            cv2.add(channel, rest, dst=sum_)
        for x, channel in enumerate(turned):
            y, z = ((x + 1) % 3, (x + 2) % 3) if sixths > 0 else ((x + 2) % 3, (x + 1) % 3)
            # OpenCV saturates at 0 and 255: neither max(0, ·) nor a wider type is needed.
            cv2.subtract(given[y], plus_rest[z], dst=channel)
            cv2.subtract(given[z], plus_rest[y], dst=rise)
            cv2.add(cv2.subtract(given[x], channel, dst=channel), rise, dst=channel)
            cv2.max(cv2.min(channel, largest, dst=channel), smallest, dst=channel)
        cv2.merge(turned, dst=out)
        return out
