"""The renderer: it draws a scene as a square picture, of 128 by 128 pixels unless told otherwise.

The picture is painted in layers (sky, sun or moon, cloud or stars, ground, object, fireworks).  Each layer
takes its random choices from a generator of its own, seeded with the picture's seed and the layer's fixed
number, so an edit of one attribute repaints the pixels of its own layer and leaves every other pixel as it
was.

All coordinates are those of a picture of 128 by 128 pixels.  Larger pictures show the same drawing, drawn larger.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fisedit_compile.errors import OptionError

from .world import Colour, Ground, Place, Scene, TimeOfDay

SIZE = 128
"""Width and height of a picture in pixels where none are given; coordinates of the drawing refer to it."""

SMALLEST_SIZE, LARGEST_SIZE = 32, 4096
"""Sides of pictures that can be drawn: objects of smaller ones could not be told apart."""

_OVERSAMPLING = 2

_SKY_LAYER, _LIGHT_LAYER, _DETAIL_LAYER, _GROUND_LAYER, _OBJECT_LAYER, _FIREWORKS_LAYER = range(6)

RGB = tuple[int, int, int]

COLOUR_VALUES: dict[Colour, RGB] = {
    "red": (225, 25, 30),
    "yellow": (255, 225, 0),
    "blue": (25, 70, 235),
    "purple": (165, 35, 190),
}
"""The colour of an object's body, the same at every time of day."""

_SKY_COLOURS: dict[TimeOfDay, tuple[RGB, RGB]] = {
    "day": ((95, 175, 245), (190, 228, 252)),
    "sunset": ((205, 95, 80), (255, 185, 100)),
    "night": ((8, 10, 35), (28, 32, 80)),
}
_GROUND_COLOURS: dict[Ground, RGB] = {
    "grass": (85, 175, 70),
    "sand": (222, 190, 130),
    "snow": (240, 244, 250),
}
_GROUND_TINTS: dict[TimeOfDay, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.88, 0.74, 0.68),
    "night": (0.42, 0.44, 0.56),
}
PLACE_COLUMNS: dict[Place, float] = {"left": 27.0, "middle": 64.0, "right": 101.0}
"""The column around which an object at a place stands."""

FIREWORKS_VALUES: tuple[RGB, ...] = ((255, 50, 150), (60, 255, 120), (255, 240, 60))
_FIREWORKS_CENTRES = ((24.0, 26.0), (64.0, 20.0), (104.0, 27.0))
LIGHT_VALUES: dict[TimeOfDay, tuple[RGB, RGB]] = {
    "day": ((255, 245, 170), (250, 252, 255)),
    "sunset": ((255, 240, 175), (250, 205, 175)),
    "night": ((225, 228, 240), (215, 215, 235)),
}
"""The colours of the sun or the moon, and of the cloud or the stars."""

ROOF_SHADE = 0.72
"""What a house's roof colour is multiplied by."""

DARK_VALUE: RGB = (35, 32, 38)
"""The colour of doors and wheels."""


def _generator(seed: int, layer: int) -> random.Random:
    """The generator of one layer of one picture."""
    return random.Random(seed * 8 + layer)


def sky_column(time: TimeOfDay, size: int = SIZE) -> NDArray[np.float32]:
    """The sky's colour in each row, ``float32`` of shape ``[size, 3]`` with values from 0 to 255."""
    return _sky_gradient(time, size).astype(np.float32)


def _sky_gradient(time: TimeOfDay, side: int) -> NDArray[np.float64]:
    """The sky's colour in each of ``side`` rows."""
    top, bottom = (np.array(colour, dtype=np.float64) for colour in _SKY_COLOURS[time])
    weights = np.clip(np.arange(side) / (side * 0.64), 0.0, 1.0)[:, None]
    return top * (1.0 - weights) + bottom * weights


@lru_cache(maxsize=8)
def _sky(time: TimeOfDay, size: int) -> Image.Image:
    """The sky of a picture of ``size`` pixels, at the drawing's resolution."""
    side = size * _OVERSAMPLING
    column = np.rint(_sky_gradient(time, side)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None, :], (side, side, 3))))


def ground_value(ground: Ground, time: TimeOfDay) -> RGB:
    """The colour of a ground at a time of day."""
    tinted = zip(_GROUND_COLOURS[ground], _GROUND_TINTS[time], strict=True)
    red, green, blue = (round(channel * tint) for channel, tint in tinted)
    return red, green, blue


@dataclass
class _Canvas:
    """A drawing surface whose coordinates are those of a picture of 128 by 128 pixels."""

    image: Image.Image

    def __post_init__(self) -> None:
        self._draw = ImageDraw.Draw(self.image)
        self._scale = self.image.width / SIZE

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        scale = self._scale
        self._draw.rectangle((left * scale, top * scale, right * scale - 1, bottom * scale - 1), fill=colour)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: RGB) -> None:
        scale = self._scale
        self._draw.ellipse(
            (
                (x - radius_x) * scale,
                (y - radius_y) * scale,
                (x + radius_x) * scale - 1,
                (y + radius_y) * scale - 1,
            ),
            fill=colour,
        )

    def polygon(self, points: list[tuple[float, float]], colour: RGB) -> None:
        self._draw.polygon([(x * self._scale, y * self._scale) for x, y in points], fill=colour)

    def stroke(self, start: tuple[float, float], end: tuple[float, float], width: float, colour: RGB) -> None:
        scale = self._scale
        self._draw.line(
            (start[0] * scale, start[1] * scale, end[0] * scale, end[1] * scale),
            fill=colour,
            width=round(width * scale),
        )


def darker(colour: RGB, factor: float) -> RGB:
    """A colour with each channel multiplied by ``factor``."""
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue


def _paint_light(canvas: _Canvas, time: TimeOfDay, seed: int) -> None:
    """Paint the sun or the moon."""
    generator = _generator(seed, _LIGHT_LAYER)
    side = generator.choice((-1, 1))
    offset = generator.uniform(-4.0, 4.0)
    colour = LIGHT_VALUES[time][0]
    if time == "day":
        canvas.ellipse(64 + side * 44 + offset, 15, 9, 9, colour)
    elif time == "sunset":
        canvas.ellipse(64 + side * 22 + offset, 70, 13, 13, colour)
    else:
        canvas.ellipse(64 + side * 44 + offset, 15, 8, 8, colour)


def _paint_detail(canvas: _Canvas, time: TimeOfDay, seed: int) -> None:
    """Paint a cloud by day and at sunset, and stars at night."""
    generator = _generator(seed, _DETAIL_LAYER)
    colour = LIGHT_VALUES[time][1]
    if time == "night":
        for slot in range(6):
            x = 12 + slot * 21 + generator.uniform(-6.0, 6.0)
            canvas.ellipse(x, generator.uniform(6.0, 52.0), 1.5, 1.5, colour)
        return
    x, y = generator.uniform(28.0, 100.0), generator.uniform(40.0, 48.0)
    canvas.ellipse(x, y, 16, 5, colour)
    canvas.ellipse(x - 3, y - 4, 8, 5, colour)


def _paint_ground(canvas: _Canvas, ground: Ground, time: TimeOfDay, seed: int) -> None:
    """Paint the ground below a horizon that lies a little higher or lower from picture to picture."""
    horizon = round(_generator(seed, _GROUND_LAYER).uniform(77.0, 82.0))
    canvas.box(0, horizon, SIZE, SIZE, ground_value(ground, time))


def _paint_object(canvas: _Canvas, scene: Scene, seed: int) -> None:
    """Paint the ball, the house or the car."""
    if scene.is_empty:
        return
    generator = _generator(seed, _OBJECT_LAYER)
    x = PLACE_COLUMNS[scene.place] + generator.uniform(-4.0, 4.0)
    base = 108.0 + generator.uniform(-3.0, 3.0)
    colour = COLOUR_VALUES[scene.colour]
    if scene.object_kind == "ball":
        canvas.ellipse(x, base - 17, 17, 17, colour)
    elif scene.object_kind == "house":
        canvas.box(x - 15, base - 23, x + 15, base, colour)
        canvas.polygon([(x - 20, base - 22), (x, base - 42), (x + 20, base - 22)], darker(colour, ROOF_SHADE))
        canvas.box(x - 4, base - 13, x + 4, base, DARK_VALUE)
    else:
        canvas.box(x - 22, base - 18, x + 22, base - 5, colour)
        canvas.polygon([(x - 14, base - 17), (x - 9, base - 29), (x + 9, base - 29), (x + 14, base - 17)], colour)
        for wheel in (-12.5, 12.5):
            canvas.ellipse(x + wheel, base - 5, 6, 6, DARK_VALUE)


def _paint_fireworks(canvas: _Canvas, fireworks: bool, seed: int) -> None:
    """Paint three bursts of thick rays in the upper sky."""
    if not fireworks:
        return
    generator = _generator(seed, _FIREWORKS_LAYER)
    for (centre_x, centre_y), colour in zip(_FIREWORKS_CENTRES, FIREWORKS_VALUES, strict=True):
        x, y = centre_x + generator.uniform(-3.0, 3.0), centre_y + generator.uniform(-3.0, 3.0)
        turn = generator.uniform(0.0, math.pi / 3)
        for ray in range(6):
            angle = turn + ray * math.pi / 3
            end = (x + 14 * math.cos(angle), y + 14 * math.sin(angle))
            canvas.stroke((x, y), end, 4, colour)


def render(scene: Scene, seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.
        seed: chooses the picture among those of the scene (where exactly the object stands, where the sun
            is, how high the horizon lies).  The same scene and seed always give the same picture.
        size: width and height of the picture in pixels.  The content does not depend on it.

    Returns:
        The picture, ``uint8`` of shape ``[size, size, 3]`` (row, column, red-green-blue).

    Raises:
        OptionError: the size is not from 32 to 4096.
    """
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise OptionError(f"a drawing has from {SMALLEST_SIZE} to {LARGEST_SIZE} pixels a side, got {size}")
    canvas = _Canvas(_sky(scene.time, size).copy())
    _paint_light(canvas, scene.time, seed)
    _paint_detail(canvas, scene.time, seed)
    _paint_ground(canvas, scene.ground, scene.time, seed)
    _paint_object(canvas, scene, seed)
    _paint_fireworks(canvas, scene.fireworks, seed)
    return np.asarray(canvas.image.reduce(_OVERSAMPLING), dtype=np.uint8)
