"""Turning the hue of 8-bit RGB images without a way through HSV."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class HueTurner:
    """Turn the hue of images of one size, in buffers that it keeps.

    The result is that of HSV in real numbers, rounded once to 8 bits. (Pillow's operator, which torchvision calls,
    rounds hue and saturation to 256 steps on the way, and is off by up to six.)

    A turn leaves the largest channel's value V and the smallest one's m as they are. By up to a sixth of the circle, d
    of it, it takes a channel x, which y and z follow on the circle, to x - max(0, y - z - e) + max(0, z - y - e), cut
    to m–V, with e = (1 - d)·(V - m): x falls where y is the largest, rises where z is. The other way round y and z
    change places. By thirds of the circle, channels change their names.

    Args:
        size: Side S of the images in pixels.
    """

    def __init__(self, size: int) -> None:
        self._planes = list(np.empty((13, size, size), np.uint8))

    def __call__(self, image: Pixels, turns: float, out: Pixels) -> Pixels:
        """Turn by a part of the colour circle; a third makes red green.

        Args:
            image: RGB (S, S, 3).
            turns: -1 to 1.
            out: RGB (S, S, 3), overwritten; may be the image itself.

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
            # OpenCV's differences stop at 0 and its sums at 255: no max(0, ·) is needed, and no wider number.
            cv2.subtract(given[y], plus_rest[z], dst=channel)
            cv2.subtract(given[z], plus_rest[y], dst=rise)
            cv2.add(cv2.subtract(given[x], channel, dst=channel), rise, dst=channel)
            cv2.max(cv2.min(channel, largest, dst=channel), smallest, dst=channel)
        cv2.merge(turned, dst=out)
        return out
