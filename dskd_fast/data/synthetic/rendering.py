"""From a description to an image."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from dskd_fast.data.synthetic.scene import (
    BAG_HALF,
    CAMERA_NOISE,
    CANVAS,
    CREASES,
    FloatArray,
    Light,
    Mark,
    Part,
    Pose,
    Scene,
    Surface,
)

SUPERSAMPLING = 2


@dataclass(frozen=True)
class Canvas:
    """The pixel grid of an image of `size` = (width, height) and its place in the scene."""

    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels per scene unit."""
        return min(self.size[0] / CANVAS[0], self.size[1] / CANVAS[1])

    def _axis(self, axis: int, start: int, stop: int, step: int) -> FloatArray:
        pixels = (np.arange(start * step, stop * step, dtype=np.float32) + 0.5) / step
        return ((pixels - self.size[axis] / 2) / self.scale + CANVAS[axis] / 2).astype(np.float32)

    def grid(self) -> tuple[FloatArray, FloatArray]:
        """Scene coordinates of all pixels, each (H, W)."""
        width, height = self.size
        x, y = np.meshgrid(self._axis(0, 0, width, 1), self._axis(1, 0, height, 1))
        return x, y

    def window(self, x: float, y: float, reach: float, step: int = 1):
        """The pixels around a scene point.

        Returns slices into the image, and x and y with `step` samples per pixel each way.
        """
        slices, axes = [], []
        for axis, centre in ((1, y), (0, x)):
            middle = (centre - CANVAS[axis] / 2) * self.scale + self.size[axis] / 2
            start = max(math.floor(middle - reach * self.scale) - 1, 0)
            stop = min(math.ceil(middle + reach * self.scale) + 2, self.size[axis])
            slices.append(slice(start, max(start, stop)))
            axes.append(self._axis(axis, start, max(start, stop), step))
        return tuple(slices), *np.meshgrid(axes[1], axes[0])


def _downsample(values: FloatArray) -> FloatArray:
    step = SUPERSAMPLING
    return sum(values[i::step, j::step] for i in range(step) for j in range(step)) / step**2


def _part_window(part: Part, bag: Pose, canvas: Canvas):
    window, x, y = canvas.window(*bag.to_outer(part.pose.x, part.pose.y), part.reach, SUPERSAMPLING)
    return window, *part.pose.to_inner(*bag.to_inner(x, y))


def _mark_window(mark: Mark, bag: Pose, canvas: Canvas):
    window, x, y = canvas.window(*bag.to_outer(mark.pose.x, mark.pose.y), mark.reach)
    return window, *mark.pose.to_inner(*bag.to_inner(x, y))


def _metal(surface: Surface, spacing: float, light: Light, tint: tuple[float, float, float]) -> FloatArray:
    """Colour (h, w, 3) of a polished relief that mirrors a bright soft light in a grey room."""
    slope_y, slope_x = np.gradient(surface.height.astype(np.float32), spacing)
    nz = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    nx, ny = -slope_x * nz, -slope_y * nz
    lx, ly, lz = light.direction
    diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0)
    # Mirror direction of a ray that falls straight down.
    towards = 2 * nz * (nx * lx + ny * ly) + (2 * nz * nz - 1) * lz
    room = 0.5 + 0.5 * towards
    glint = np.maximum(towards, 0) ** 16
    grey = (0.03 + 0.22 * diffuse + 0.55 * room**4) * surface.albedo + 0.6 * glint
    colour = grey[..., None] * np.asarray(tint, np.float32)
    if surface.stain is not None:
        rust = (0.12 + 0.25 * diffuse)[..., None] * np.array((0.85, 0.27, 0.07), np.float32)
        colour = colour + 0.92 * surface.stain[..., None] * (rust - colour)
    return colour.astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> FloatArray:
    grid = Image.fromarray(rng.standard_normal((cells[1], cells[0]), dtype=np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC))


def _bag_depth(u, v) -> FloatArray:
    """Distance inwards from the bag's outline, a rounded rectangle with slightly wavy edges."""
    qx, qy = np.abs(u) - (BAG_HALF[0] - 9), np.abs(v) - (BAG_HALF[1] - 9)
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)
    return 9 - outside + 0.9 * np.sin(0.031 * u + 1.0) + 0.9 * np.sin(0.043 * v)


def _film_relief(u, v, bulge: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Height of the film: it rides on the parts (`bulge`), is taut at the seams and has creases."""
    relief = 5.0 * bulge
    for _ in range(rng.integers(CREASES[0], CREASES[1] + 1)):
        x, y = rng.uniform(-180, 180), rng.uniform(-80, 120)
        angle, length = rng.uniform(0, math.pi), rng.uniform(35, 90)
        width, height = rng.uniform(4, 10), rng.uniform(0.8, 2.2)
        along, across = Pose(x, y, angle).to_inner(u, v)
        across = across + 0.0022 * rng.uniform(-1, 1) * along**2
        relief += height * np.exp(-((across / width) ** 2) - (along / length) ** 2)
    return relief


def render(scene: Scene, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: (width, height) of the image in pixels.

    Returns:
        The RGB image, uint8 of shape (H, W, 3).
    """
    canvas = Canvas(size)
    pixel = 1 / canvas.scale
    rng = np.random.default_rng(scene.texture)
    x, y = canvas.grid()
    u, v = scene.bag.to_inner(x, y)
    depth = _bag_depth(u, v)
    in_bag = np.clip(depth / pixel + 0.5, 0, 1)

    # Parts, as premultiplied colour; they never overlap, so their order does not matter.
    metal = np.zeros((*x.shape, 3), np.float32)
    covered = np.zeros(x.shape, np.float32)
    for part in scene.parts:
        window, px, py = _part_window(part, scene.bag, canvas)
        surface = part.surface(px, py, pixel / SUPERSAMPLING)
        alpha = surface.alpha.astype(np.float32)
        colour = _metal(surface, pixel / SUPERSAMPLING, scene.light, part.tint)
        metal[window] += _downsample(colour * alpha[..., None])
        covered[window] += _downsample(alpha)

    # Table with its shadows: soft and away from the light, and narrow where things touch.
    table = 1 + 0.05 * _smooth_noise(rng, size, (160, 112)) + 0.04 * _smooth_noise(rng, size, (12, 9))
    lx, ly, _ = scene.light.direction
    away = (-7 * ly * canvas.scale, -7 * lx * canvas.scale)
    cast = shift(gaussian_filter(covered, 3.2 * canvas.scale, truncate=2.5), away, order=1)
    bulge = gaussian_filter(covered, 6 * canvas.scale, truncate=2.5)
    # The bag's own shadow hugs its outline, so the distance to it stands in for a blur.
    around = 0.35 * np.exp(-np.maximum(_bag_depth(u + 3 * lx, v + 3 * ly) * -1, 0) / 5)
    table = table * (1 - 0.62 * cast) * (1 - 0.2 * bulge) * (1 - around * (1 - in_bag))
    table *= 1 - covered
    bare = table[..., None] * np.array((0.070, 0.085, 0.110), np.float32)
    bare += metal

    # Film: a grey veil plus mirror images of the light wherever the relief has the right slope.
    relief = _film_relief(u, v, bulge, rng)
    slope_y, slope_x = np.gradient(relief, pixel)
    slope_x += 0.035 * _smooth_noise(rng, size, (30, 21))
    slope_y += 0.035 * _smooth_noise(rng, size, (30, 21))
    off = (slope_x - 0.30 * -lx) ** 2 + (slope_y - 0.30 * -ly) ** 2
    shine = 0.10 * np.exp(-off / 0.02) + 0.38 * np.exp(-off / 0.003)
    facing = np.clip(0.5 - 0.9 * (slope_x * lx + slope_y * ly), 0, 1)
    veil = 0.022 + 0.05 * facing
    film = _seams_and_zip(u, v, depth, pixel)
    film += (shine + veil)[..., None]
    film *= in_bag[..., None]
    film += bare * (1 - 0.14 * in_bag)[..., None]

    for mark in scene.marks:
        window, mx, my = _mark_window(mark, scene.bag, canvas)
        film[window] = mark.paint(mx, my, pixel, film[window], bare[window])

    spot_x, spot_y = scene.light.spot
    falloff = 1.12 * scene.light.gain / (1 + ((x - spot_x) ** 2 + (y - spot_y) ** 2) / 520.0**2)
    levels = np.maximum(film, 0)
    levels *= falloff[..., None]
    # A soft shoulder keeps highlights from clipping flat; the square root stands in for the display's gamma.
    levels /= 1 + 0.15 * levels
    np.sqrt(levels, out=levels)
    levels *= 255
    noise = rng.standard_normal(levels.shape, dtype=np.float32)
    noise *= CAMERA_NOISE
    levels += noise
    np.rint(levels, out=levels)
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def _seams_and_zip(u, v, depth: FloatArray, pixel: float) -> FloatArray:
    """Light (H, W, 3) added by the bag's fixed features: edge, three seams, lip and zip at the top."""
    soft = max(pixel, 1.0)

    def band(distance, half_width):
        return np.clip((half_width - np.abs(distance)) / soft + 0.5, 0, 1)

    side = np.minimum(BAG_HALF[0] - np.abs(u), BAG_HALF[1] - v)
    weld = band(side - 7, 3.5) * (0.05 + 0.05 * np.sin(1.1 * (u + v)) * np.sin(1.1 * (u - v)))
    white = 0.20 * band(depth - 1.0, 0.8) + weld
    white += 0.13 * band(v + 118, 1.2) + 0.13 * band(v + 106, 1.2) - 0.02 * band(v + 116, 0.8)
    white += 0.03 * (v < -112)
    stripe = 0.75 * band(v + 112, 2.6)
    light = stripe[..., None] * np.array((0.05, 0.16, 0.42), np.float32)
    light += white[..., None]
    return light
