"""Drawing in retina coordinates: the field of view is the unit disc, x to the right, y downwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.special import expit

Array = NDArray[np.floating]
Color = tuple[float, float, float]
Place = tuple[float, float]


def edge(distance: Array, softness: float) -> Array:
    """Return 1 where ``distance`` is below 1, 0 above, with a soft border."""
    inside: Array = expit((1 - distance) / softness)
    return inside


def planes(color: Color) -> Array:
    """Return a color as an array [3, 1, 1], to be multiplied by a mask [size, size]."""
    return np.asarray(color, np.float32)[:, None, None]


def to_image(rgb: Array) -> Image.Image:
    """Return three planes [3, size, size] on a 0-1 scale as an RGB image."""
    levels = np.clip(rgb, 0, 1)
    levels *= 255
    return Image.merge("RGB", [Image.fromarray(plane) for plane in levels.astype(np.uint8)])


@dataclass
class Canvas:
    """A picture under construction, in linear 0-1 RGB planes [3, size, size], with its random stream."""

    size: int
    rng: np.random.Generator
    rgb: Array = field(init=False)

    def __post_init__(self) -> None:
        self.axis = ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size * 2 - 1) * np.float32(1.04)

    def squared_distance(self, center: Place, ratio: float = 1.0) -> Array:
        """Return the square of :meth:`distance`, in double precision."""
        x, y = (self.axis - center[0]) / ratio, self.axis - center[1]
        squares: Array = np.square(x, dtype=np.float64) + np.square(y, dtype=np.float64)[:, None]
        return squares

    def distance(self, center: Place, ratio: float = 1.0) -> Array:
        """Return the distance of every pixel to a point; ``ratio`` < 1 turns the unit circle into a tall ellipse."""
        return np.sqrt(self.squared_distance(center, ratio)).astype(np.float32)

    def noise(self, cells: int) -> Array:
        """Generate smooth noise of unit variance with about ``cells`` bumps along a side."""
        coarse = self.rng.standard_normal((cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def blend(self, mask: Array, color: Color) -> None:
        """Paint a color through a 0-1 mask."""
        weight = np.clip(mask, 0, 1)
        self.rgb *= 1 - weight
        self.rgb += weight * planes(color)

    def soften(self, radius: float) -> None:
        """Blur the whole picture by a Gaussian of ``radius`` field radii."""
        blurred = to_image(self.rgb).filter(ImageFilter.GaussianBlur(radius * self.size / 2.08))
        self.rgb = np.stack([np.asarray(band, np.float32) for band in blurred.split()]) / 255

    def mask(self, blur: float = 0.0) -> "Mask":
        """Return a blank mask to draw on, blurred by ``blur`` field radii when read."""
        return Mask(self.size, blur)

    def scatter(
        self, count: int, center: Place, near: float, far: float, keep_off: Place | None = None
    ) -> list[Place]:
        """Return random places between two distances from a center, inside the field, away from the disc."""
        places: list[Place] = []
        for _ in range(count * 6):
            distance = np.sqrt(self.rng.uniform(near**2, far**2))
            angle = self.rng.uniform(0, 2 * np.pi)
            x, y = float(center[0] + distance * np.cos(angle)), float(center[1] + distance * np.sin(angle))
            if np.hypot(x, y) < 0.93 and (
                keep_off is None or np.hypot(x - keep_off[0], y - keep_off[1]) > 0.22
            ):
                places.append((x, y))
            if len(places) == count:
                break
        return places


class Mask:
    """A gray mask drawn in retina coordinates."""

    def __init__(self, size: int, blur: float) -> None:
        self._image = Image.new("L", (size, size))
        self._draw = ImageDraw.Draw(self._image)
        self._scale = size / 2.08
        self._blur = blur

    def _pixel(self, value: float) -> float:
        return (value + 1.04) * self._scale

    def spot(self, place: Place, radius: float, ratio: float = 1.0, level: float = 1.0) -> None:
        """Draw an ellipse."""
        x, y = self._pixel(place[0]), self._pixel(place[1])
        rx, ry = max(radius * ratio * self._scale, 0.5), max(radius * self._scale, 0.5)
        self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(255 * level))

    def line(self, points: Sequence[Place], width: float, level: float = 1.0) -> None:
        """Draw a polyline."""
        pixels = [self._pixel(value) for point in points for value in point]
        pen = max(1, round(width * self._scale))
        self._draw.line(pixels, fill=int(255 * level), width=pen, joint="curve" if pen > 2 else None)

    def read(self) -> Array:
        """Return the mask on a 0-1 scale."""
        image = self._image
        if self._blur:
            image = image.filter(ImageFilter.GaussianBlur(self._blur * self._scale))
        return np.asarray(image, np.float32) / 255
