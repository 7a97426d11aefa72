"""From a description to an image, and to the pixels that one part covers."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from dskd_fast.data.synthetic.scene import BAG_HALF, CANVAS, FloatArray, Mark, Part, Pose, Scene

SUPERSAMPLING = 2
CREASES = (1, 3)
CAMERA_NOISE = 1.6  # standard deviation in grey levels


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
        x, y = np.meshgrid(self._axis(0, 0, self.size[0], 1), self._axis(1, 0, self.size[1], 1))
        return x, y

    def window(self, item: Part | Mark, bag: Pose, step: int = 1):
        """The pixels around a part or mark.

        Returns slices into the image, and x and y in the item's frame with `step` samples per pixel each way.
        """
        x, y = bag.to_outer(item.pose.x, item.pose.y)
        slices, axes = [], []
        for axis, centre in ((1, y), (0, x)):
            middle = (centre - CANVAS[axis] / 2) * self.scale + self.size[axis] / 2
            start = max(math.floor(middle - item.reach * self.scale) - 1, 0)
            stop = max(start, min(math.ceil(middle + item.reach * self.scale) + 2, self.size[axis]))
            slices.append(slice(start, stop))
            axes.append(self._axis(axis, start, stop, step))
        return tuple(slices), *item.pose.to_inner(*bag.to_inner(*np.meshgrid(axes[1], axes[0])))


def coverage(item: Part | Mark, bag: Pose, canvas: Canvas) -> FloatArray:
    """Share of each pixel that a part or mark covers, (H, W) in [0, 1]."""
    window, x, y = canvas.window(item, bag, SUPERSAMPLING)
    sample = 1 / (canvas.scale * SUPERSAMPLING)
    alpha = item.coverage(x, y, sample) if isinstance(item, Mark) else item.surface(x, y, sample)[0]
    full = np.zeros((canvas.size[1], canvas.size[0]), np.float32)
    full[window] = _downsample(alpha)
    return full


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
    for part in scene.parts.values():
        window, px, py = canvas.window(part, scene.bag, SUPERSAMPLING)
        alpha, height, albedo = part.surface(px, py, pixel / SUPERSAMPLING)
        grey = _metal(height, albedo, pixel / SUPERSAMPLING, scene.light)
        colour = (grey[..., None] * np.asarray(part.tint, np.float32)).astype(np.float32)
        metal[window] += _downsample(colour * alpha.astype(np.float32)[..., None])
        covered[window] += _downsample(alpha)

    # Table with its shadows: soft and away from the light, and narrow where things touch.
    table = 1 + 0.05 * _smooth_noise(rng, size, (160, 112)) + 0.04 * _smooth_noise(rng, size, (12, 9))
    lx, ly, _ = scene.light
    away = (-7 * ly * canvas.scale, -7 * lx * canvas.scale)
    cast = shift(gaussian_filter(covered, 3.2 * canvas.scale, truncate=2.5), away, order=1)
    bulge = gaussian_filter(covered, 6 * canvas.scale, truncate=2.5)
    # The bag's own shadow hugs its outline, so the distance to it stands in for a blur.
    around = 0.35 * np.exp(-np.maximum(_bag_depth(u + 3 * lx, v + 3 * ly) * -1, 0) / 5)
    table = table * (1 - 0.62 * cast) * (1 - 0.2 * bulge) * (1 - around * (1 - in_bag)) * (1 - covered)
    bare = table[..., None] * np.array((0.070, 0.085, 0.110), np.float32) + metal

    # Film: a grey veil plus mirror images of the light wherever the relief has the right slope.
    slope_y, slope_x = np.gradient(_film_relief(u, v, bulge, rng), pixel)
    slope_x += 0.035 * _smooth_noise(rng, size, (30, 21))
    slope_y += 0.035 * _smooth_noise(rng, size, (30, 21))
    off = (slope_x + 0.30 * lx) ** 2 + (slope_y + 0.30 * ly) ** 2
    shine = 0.10 * np.exp(-off / 0.02) + 0.38 * np.exp(-off / 0.003)
    veil = 0.022 + 0.05 * np.clip(0.5 - 0.9 * (slope_x * lx + slope_y * ly), 0, 1)
    film = (_seams_and_zip(u, v, depth, pixel) + (shine + veil)[..., None]) * in_bag[..., None]
    film += bare * (1 - 0.14 * in_bag)[..., None]
    for mark in scene.marks:
        window, mx, my = canvas.window(mark, scene.bag)
        film[window] = mark.paint(mx, my, pixel, film[window], bare[window])

    spot_x, spot_y = scene.spot
    falloff = 1.12 * scene.gain / (1 + ((x - spot_x) ** 2 + (y - spot_y) ** 2) / 520.0**2)
    levels = np.maximum(film, 0) * falloff[..., None]
    # A soft shoulder keeps highlights from clipping flat; the square root stands in for the display's gamma.
    levels = 255 * np.sqrt(levels / (1 + 0.15 * levels))
    levels += CAMERA_NOISE * rng.standard_normal(levels.shape, dtype=np.float32)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _downsample(values: FloatArray) -> FloatArray:
    values = values.astype(np.float32)
    step = SUPERSAMPLING
    total = np.zeros_like(values[::step, ::step])
    for i in range(step):
        for j in range(step):
            total += values[i::step, j::step]
    return total / np.float32(step**2)


def _metal(height: FloatArray, albedo: FloatArray, spacing: float, light: tuple[float, float, float]) -> FloatArray:
    """Brightness (h, w) of a polished relief that mirrors a bright soft light in a grey room."""
    slope_y, slope_x = np.gradient(height.astype(np.float32), spacing)
    nz = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    nx, ny = -slope_x * nz, -slope_y * nz
    lx, ly, lz = light
    diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0)
    # Mirror direction of a ray that falls straight down.
    towards = 2 * nz * (nx * lx + ny * ly) + (2 * nz * nz - 1) * lz
    room = 0.5 + 0.5 * towards
    glint = np.maximum(towards, 0) ** 16
    return (0.03 + 0.22 * diffuse + 0.55 * room**4) * albedo + 0.6 * glint


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
        low, high = (-180, -80, 0, 35, 4, 0.8, -1), (180, 120, math.pi, 90, 10, 2.2, 1)
        x, y, angle, length, width, height, curl = rng.uniform(low, high).tolist()
        along, across = Pose(x, y, angle).to_inner(u, v)
        across = across + 0.0022 * curl * along**2
        relief += height * np.exp(-((across / width) ** 2) - (along / length) ** 2)
    return relief


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
    return stripe[..., None] * np.array((0.05, 0.16, 0.42), np.float32) + white[..., None]
