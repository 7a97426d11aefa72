"""A rendered `screw_bag` category in the layout of MVTec LOCO AD, so that no download is needed.

A good image shows one transparent zip bag with exactly one long screw, one short screw, two equal nuts and
two equal washers. Structural anomalies damage something that belongs there; logical anomalies change which
parts are there while each part is perfect in itself.

The way from a seed to a file: `sample_scene` describes a good bag (`Scene`), a `Kind` edits the description
and says which region is then defective, and `render` turns any description into an image. `render` draws
nothing at random that is not in the description, so a scene and its edited twin differ only by the defect.

Lengths are in scene units. The canvas is 480 x 336 units, fitted into the image without distortion; x runs to
the right, y downwards, angles turn clockwise. Parts and marks are placed in the frame of the bag: origin in
its middle, moving with it.
"""

import json
import math
import operator
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from dskd_fast.errors import UserError

# Goes into the manifest; raise it with every change that alters a byte of the output.
VERSION = 2

CATEGORY = "screw_bag"
MANIFEST = "synthetic.json"

# How much one good image differs from the next: everything there is to tune about how hard the category is.
# Shifts and tilts are half-ranges of uniform distributions.
BAG_SHIFT = (14.0, 10.0)
BAG_TILT = math.radians(3.0)
SCREW_SHIFT = (12.0, 12.0)
SCREW_TILT = math.radians(15.0)
SCREW_TURN_PROBABILITY = 0.0  # how often a screw lies with its head on the other side
SMALL_PART_SHIFT = (20.0, 20.0)
LIGHT_GAIN = 0.15
LIGHT_AZIMUTH = math.radians(-125.0)  # from the upper left
LIGHT_TURN = math.radians(20.0)
CREASES = (1, 3)
CAMERA_NOISE = 1.6  # standard deviation in grey levels

LONG, SHORT = 172.0, 112.0
MEDIUM, OVERLONG = 142.0, 206.0
NUT_APOTHEM, NUT_BORE = 21.5, 11.5
WASHER_OUTER, WASHER_INNER = 25.0, 12.0
HEAD_RADIUS, SHANK_RADIUS = 17.0, 7.0

CANVAS = (480.0, 336.0)
BAG_HALF = (214.0, 146.0)
INTERIOR = (-199.0, -94.0, 199.0, 130.0)  # left, top, right, bottom of where parts may lie
SMALL_PARTS = (14.0, -94.0, 199.0, 130.0)
HOMES = {
    "screw_long": (-99.0, -42.0),
    "screw_short": (-99.0, 60.0),
    "nut_upper": (62.0, -44.0),
    "nut_lower": (62.0, 72.0),
    "washer_upper": (148.0, -44.0),
    "washer_lower": (148.0, 72.0),
}
PART_GAP = 4.0

SIZE_LIMITS = (96, 2048)  # below, defects vanish; above, the threads need gigabytes
COUNT_LIMIT = 1000  # NNN.png has three digits
ATTEMPTS = 2000
SUPERSAMPLING = 2
# A pixel belongs to a painted defect from this coverage on; with one half, thin lines would fall apart.
MASK_COVERAGE = 0.25

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------ description


@dataclass(frozen=True)
class Pose:
    """Position and rotation (radians) of a frame inside the frame around it."""

    x: float
    y: float
    angle: float = 0.0

    def to_outer(self, x, y):
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.x + c * x - s * y, self.y + s * x + c * y

    def to_inner(self, x, y):
        c, s = math.cos(self.angle), math.sin(self.angle)
        return c * (x - self.x) + s * (y - self.y), c * (y - self.y) - s * (x - self.x)


@dataclass(frozen=True)
class Surface:
    """What a part looks like from above, sampled on a grid: all arrays have the grid's shape.

    `alpha` is the part's coverage in [0, 1], `height` its relief in scene units, `albedo` a factor on the
    metal's colour, `stain` the coverage of rust.
    """

    alpha: FloatArray
    height: FloatArray
    albedo: FloatArray
    stain: FloatArray | None = None


@dataclass(frozen=True)
class Bend:
    """The shank turns by `angle` from `start` on, along an arc of the given radius."""

    start: float
    angle: float
    radius: float = 34.0

    def straighten(self, x, y):
        """Map points of the bent screw's plane to where they were on the straight one."""
        side = math.copysign(1.0, self.angle)
        turn = abs(self.angle)
        across = side * y
        phi = np.arctan2(x - self.start, self.radius - across)
        arc = np.clip(phi, 0, turn)
        c, s = np.cos(arc), np.sin(arc)
        along = c * (x - self.start) - s * (self.radius - across)
        outward = s * (x - self.start) + c * (self.radius - across)
        bent = phi > 0
        return (
            np.where(bent, self.start + self.radius * arc + along, x),
            np.where(bent, side * (self.radius - outward), y),
        )

    def axis(self, x: float) -> tuple[float, float]:
        """Where the point (x, 0) of the straight screw's axis goes."""
        if x <= self.start:
            return x, 0.0
        side, turn = math.copysign(1.0, self.angle), abs(self.angle)
        arc = min((x - self.start) / self.radius, turn)
        rest = x - self.start - self.radius * arc
        return (
            self.start + self.radius * math.sin(arc) + rest * math.cos(arc),
            side * (self.radius * (1 - math.cos(arc)) + rest * math.sin(arc)),
        )


@dataclass(frozen=True)
class Rust:
    start: float
    stop: float
    phase: float

    def coverage(self, x, y):
        grain = np.sin(0.55 * x + self.phase) * np.cos(0.5 * y + 2 * self.phase) + 0.4 * np.sin(1.3 * x - 0.9 * y)
        inside = np.minimum(x - self.start, self.stop - x) / 6.0
        return np.clip(0.5 + 1.5 * (np.minimum(inside, 1.0) + 0.45 * grain), 0, 1)


@dataclass(frozen=True)
class Screw:
    """Countersunk cross-head screw lying on its side, head towards -x, seen slightly from the head's end."""

    slot: str
    pose: Pose
    length: float
    bend: Bend | None = None
    rust: Rust | None = None

    tint = (1.30, 1.08, 0.66)

    @property
    def reach(self) -> float:
        return self.length / 2 + 4

    def surface(self, x, y, pixel: float) -> Surface:
        if self.bend is not None:
            x, y = self.bend.straighten(x, y)
        face = 6.5 - self.length / 2
        tip = self.length / 2
        radius = np.interp(
            x,
            (face, face + 13, tip - 20, tip),
            (HEAD_RADIUS, SHANK_RADIUS - 1, SHANK_RADIUS - 1, 0.5),
        ).astype(np.float32)
        thread = 2 * np.abs(2 * np.mod((x + 0.3 * y) / 7.0, 1) - 1) - 1
        depth = 1.9 * np.clip((x - face - 20) / 6, 0, 1) * np.clip((tip - x) / 14, 0, 1)
        radius = radius + depth * thread
        body = np.minimum(radius - np.abs(y), np.minimum(x - face, tip - x))

        ellipse = np.hypot((x - face) * (HEAD_RADIUS / 6.5), y)
        on_face = ellipse < HEAD_RADIUS
        # The ellipse is foreshortened along x: its distance is taken in face coordinates and scaled back.
        head = (HEAD_RADIUS - ellipse) * np.where(np.abs(x - face) > 4, 6.5 / HEAD_RADIUS, 1.0)
        alpha = np.clip(np.maximum(body, head) / pixel + 0.5, 0, 1)

        height = np.where(on_face, 0.75 * (x - face) + HEAD_RADIUS * 0.6, np.sqrt(np.maximum(radius**2 - y**2, 0.04)))
        u, v = (x - face) * (HEAD_RADIUS / 6.5), y
        arm = np.minimum(np.maximum(np.abs(u) - 10.5, np.abs(v) - 3.0), np.maximum(np.abs(v) - 10.5, np.abs(u) - 3.0))
        recess = np.where(on_face, np.clip(0.5 - arm / 2.0, 0, 1), 0)
        # Grooves of the thread see less of the light than its crests.
        albedo = (1 - 0.78 * recess) * (1 + 0.22 * thread * np.minimum(depth, 1))
        stain = None if self.rust is None else self.rust.coverage(x, y)
        return Surface(alpha, height, albedo, stain)

    def discs(self) -> list[tuple[float, float, float]]:
        """Circles (x, y, radius) in the bag's frame that cover the part, for collision tests."""
        face = 6.5 - self.length / 2
        axis = [(face, HEAD_RADIUS)]
        axis += [(x, SHANK_RADIUS + 2) for x in np.arange(face + 12, self.length / 2 - 3, 6.0)]
        bent = [((x, 0.0) if self.bend is None else self.bend.axis(x), r) for x, r in axis]
        return [(*self.pose.to_outer(*point), r) for point, r in bent]

    def past_bend(self, x, y, bend: Bend) -> BoolArray:
        """Which points belong to what lies behind the bend, for this screw bent or straight."""
        if self.bend is not None:
            x, _ = self.bend.straighten(x, y)
        return x > bend.start


@dataclass(frozen=True)
class Chip:
    """What lies beyond a ragged line at `distance` from the middle, in direction `angle`, has broken off."""

    angle: float
    distance: float
    phase: float

    def kept(self, x, y):
        c, s = math.cos(self.angle), math.sin(self.angle)
        along = c * y - s * x
        ragged = 1.6 * np.sin(0.55 * along + self.phase) + 0.9 * np.sin(1.4 * along + 3 * self.phase)
        return self.distance + ragged - (c * x + s * y)


@dataclass(frozen=True)
class Nut:
    """Hexagonal nut with chamfered corners and a threaded bore, lying flat."""

    slot: str
    pose: Pose
    chip: Chip | None = None

    tint = (0.86, 0.88, 0.92)
    reach = NUT_APOTHEM / math.cos(math.pi / 6) + 2

    def surface(self, x, y, pixel: float) -> Surface:
        rho = np.hypot(x, y)
        hexagon = np.maximum(np.abs(y), np.abs(0.5 * y + (math.sqrt(3) / 2) * x))
        hexagon = np.maximum(hexagon, np.abs(0.5 * y - (math.sqrt(3) / 2) * x))
        edge = np.minimum(NUT_APOTHEM - hexagon, rho - (NUT_BORE - 2.5))
        height = 9 - 0.75 * np.maximum(rho - NUT_APOTHEM + 2.0, 0) - 1.1 * np.maximum(hexagon - NUT_APOTHEM + 1.5, 0)
        height = height - 0.7 * np.maximum(NUT_BORE + 2.5 - rho, 0) - 1.8 * np.maximum(NUT_BORE - rho, 0)
        albedo = np.where(rho < NUT_BORE, 0.45 + 0.2 * np.sin(5.0 * rho), 1.0)
        if self.chip is not None:
            kept = self.chip.kept(x, y)
            edge = np.minimum(edge, kept)
            albedo = albedo * np.where(kept < 3.0, 0.55, 1.0)
        return Surface(np.clip(edge / pixel + 0.5, 0, 1), height, albedo)

    def discs(self) -> list[tuple[float, float, float]]:
        return [(self.pose.x, self.pose.y, self.reach - 2)]


@dataclass(frozen=True)
class Gap:
    """The sector of `width` radians around `angle` has broken out of a ring."""

    angle: float
    width: float
    phase: float

    def kept(self, x, y):
        rho = np.hypot(x, y)
        turn = np.arctan2(y, x) - self.angle
        away = np.abs(np.mod(turn + math.pi, 2 * math.pi) - math.pi)
        ragged = 1.3 * np.sin(0.7 * rho + self.phase) + 0.7 * np.sin(1.7 * rho + 2 * self.phase)
        return rho * (away - self.width / 2) + ragged


@dataclass(frozen=True)
class Washer:
    """Flat ring with rounded edges and concentric machining marks."""

    slot: str
    pose: Pose
    gap: Gap | None = None

    tint = (0.86, 0.85, 0.83)
    reach = WASHER_OUTER + 2

    def surface(self, x, y, pixel: float) -> Surface:
        rho = np.hypot(x, y)
        edge = np.minimum(WASHER_OUTER - rho, rho - WASHER_INNER)
        height = 3 - 0.3 * np.maximum(1.8 - edge, 0) ** 2
        # Turned metal glints in the two sectors that lie towards and away from the light.
        sector = np.arctan2(y, x) + self.pose.angle - LIGHT_AZIMUTH
        albedo = 0.92 + 0.3 * np.cos(2 * sector) + 0.06 * np.sin(2.6 * rho)
        if self.gap is not None:
            kept = self.gap.kept(x, y)
            edge = np.minimum(edge, kept)
            albedo = albedo * np.where(kept < 2.0, 0.6, 1.0)
        return Surface(np.clip(edge / pixel + 0.5, 0, 1), height, albedo)

    def discs(self) -> list[tuple[float, float, float]]:
        return [(self.pose.x, self.pose.y, WASHER_OUTER)]


Part = Screw | Nut | Washer


def _identity(part: Part) -> tuple[str, float]:
    return type(part).__name__, getattr(part, "length", 0.0)


def _polyline_distance(x, y, points: tuple[tuple[float, float], ...]) -> FloatArray:
    nearest = np.full(np.broadcast(x, y).shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in pairwise(points):
        dx, dy = bx - ax, by - ay
        t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        np.minimum(nearest, (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2, out=nearest)
    return np.sqrt(nearest)


@dataclass(frozen=True)
class Lines:
    """Thin lines on the film: a scratch (bright, several strands) or a fibre (dark, one strand)."""

    pose: Pose
    strands: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    colour: tuple[float, float, float]

    @property
    def reach(self) -> float:
        return max(math.hypot(*point) for strand in self.strands for point in strand) + self.width

    def coverage(self, x, y, pixel: float) -> FloatArray:
        distance = np.minimum.reduce([_polyline_distance(x, y, strand) for strand in self.strands])
        # At least one pixel wide, so that it is drawn at every size.
        return np.clip((max(self.width, pixel) / 2 - distance) / pixel + 0.5, 0, 1)

    def paint(self, x, y, pixel: float, film: FloatArray, bare: FloatArray) -> FloatArray:
        cover = 0.85 * self.coverage(x, y, pixel)[..., None]
        return film + cover * (np.asarray(self.colour, np.float32) - film)


@dataclass(frozen=True)
class Blob:
    """A drop of oil or a crumb of rust on the film, with an irregular outline."""

    pose: Pose
    radius: float
    waves: tuple[tuple[float, float], ...]  # amplitude and phase of the outline's harmonics from the second on
    colour: tuple[float, float, float]

    @property
    def reach(self) -> float:
        return self.radius * (1 + sum(amplitude for amplitude, _ in self.waves)) + 2

    def _depth(self, x, y):
        phi = np.arctan2(y, x)
        outline = 1 + sum(a * np.cos(k * phi + p) for k, (a, p) in enumerate(self.waves, start=2))
        return self.radius * outline - np.hypot(x, y)

    def coverage(self, x, y, pixel: float) -> FloatArray:
        return np.clip(self._depth(x, y) / max(pixel, 1.2) + 0.5, 0, 1)

    def paint(self, x, y, pixel: float, film: FloatArray, bare: FloatArray) -> FloatArray:
        cover = self.coverage(x, y, pixel)[..., None]
        glint = np.exp(-((x + self.radius * 0.35) ** 2 + (y + self.radius * 0.35) ** 2) / (0.12 * self.radius**2))
        drop = np.asarray(self.colour, np.float32) + 0.22 * glint[..., None]
        return film + 0.93 * cover * (drop - film)


@dataclass(frozen=True)
class Tear:
    """A slit in the film that gapes: bare contents inside, a curled bright lip around."""

    pose: Pose
    length: float
    width: float
    phase: float
    lip: float = 2.6

    @property
    def reach(self) -> float:
        return self.length / 2 + 2 * self.lip

    def _depth(self, x, y):
        ragged = 1 + 0.22 * np.sin(0.31 * x + self.phase) + 0.14 * np.sin(0.83 * x + 2 * self.phase)
        gape = self.width / 2 * (1 - (2 * x / self.length) ** 2) * ragged
        return np.minimum(gape - np.abs(y + 2 * np.sin(0.12 * x + self.phase)), self.length / 2 - np.abs(x))

    def coverage(self, x, y, pixel: float) -> FloatArray:
        return np.clip((self._depth(x, y) + self.lip) / pixel + 0.5, 0, 1)

    def paint(self, x, y, pixel: float, film: FloatArray, bare: FloatArray) -> FloatArray:
        depth = self._depth(x, y)
        opening = np.clip(depth / pixel + 0.5, 0, 1)[..., None]
        # The lip throws a narrow shadow onto what is behind it.
        inside = bare * (1 - 0.55 * np.exp(-np.maximum(depth, 0) / 3.0))[..., None]
        curl = 0.42 + 0.3 * np.clip(-y / self.width, -1, 1)
        lip = film + 0.8 * (curl[..., None] - film)
        torn = lip + opening * (inside - lip)
        return film + self.coverage(x, y, pixel)[..., None] * (torn - film)


Mark = Lines | Blob | Tear


@dataclass(frozen=True)
class Light:
    azimuth: float  # radians, the direction the light comes from in the image plane
    elevation: float
    gain: float
    spot: tuple[float, float]  # where on the canvas it is brightest

    @property
    def direction(self) -> tuple[float, float, float]:
        flat = math.cos(self.elevation)
        return flat * math.cos(self.azimuth), flat * math.sin(self.azimuth), math.sin(self.elevation)


@dataclass(frozen=True)
class Scene:
    """Everything that `render` draws; `texture` seeds table, creases, film and camera noise."""

    bag: Pose
    light: Light
    parts: tuple[Part, ...]
    texture: int
    marks: tuple[Mark, ...] = field(default=())

    def inventory(self) -> list[tuple[str, float]]:
        """The sorted list of (kind of part, length; 0 for nuts and washers)."""
        return sorted(_identity(part) for part in self.parts)


def _jitter(rng: np.random.Generator, half_range: float) -> float:
    return float(rng.uniform(-half_range, half_range))


def _fits(part: Part, others: tuple[Part, ...], box: tuple[float, float, float, float] = INTERIOR) -> bool:
    left, top, right, bottom = box
    discs = np.array(part.discs())
    x, y, r = discs.T
    if (x - r).min() < left or (x + r).max() > right or (y - r).min() < top or (y + r).max() > bottom:
        return False
    for other in others:
        ox, oy, rest = np.array(other.discs()).T
        apart = np.hypot(x[:, None] - ox, y[:, None] - oy) - r[:, None] - rest
        if apart.min() < PART_GAP:
            return False
    return True


def _sample_screw(rng: np.random.Generator, slot: str, length: float) -> Screw:
    x, y = HOMES[slot]
    angle = _jitter(rng, SCREW_TILT) + (math.pi if rng.random() < SCREW_TURN_PROBABILITY else 0.0)
    return Screw(slot, Pose(x + _jitter(rng, SCREW_SHIFT[0]), y + _jitter(rng, SCREW_SHIFT[1]), angle), length)


def _sample_part(rng: np.random.Generator, slot: str) -> Part:
    if slot.startswith("screw"):
        return _sample_screw(rng, slot, LONG if slot == "screw_long" else SHORT)
    x, y = HOMES[slot]
    pose = Pose(
        x + _jitter(rng, SMALL_PART_SHIFT[0]),
        y + _jitter(rng, SMALL_PART_SHIFT[1]),
        float(rng.uniform(0, 2 * math.pi)),
    )
    return Nut(slot, pose) if slot.startswith("nut") else Washer(slot, pose)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Describe one good bag: a long and a short screw, two nuts, two washers, no two of them touching."""
    for _ in range(ATTEMPTS):
        parts: tuple[Part, ...] = ()
        for slot in HOMES:
            part = _sample_part(rng, slot)
            if not _fits(part, parts):
                break
            parts = (*parts, part)
        else:
            break
    else:
        raise RuntimeError("no arrangement without overlap found: the layout constants leave too little room")
    centre_x, centre_y = CANVAS[0] / 2, CANVAS[1] / 2
    return Scene(
        bag=Pose(
            centre_x + _jitter(rng, BAG_SHIFT[0]),
            centre_y + _jitter(rng, BAG_SHIFT[1]),
            _jitter(rng, BAG_TILT),
        ),
        light=Light(
            azimuth=LIGHT_AZIMUTH + _jitter(rng, LIGHT_TURN),
            elevation=math.radians(50) + _jitter(rng, math.radians(5)),
            gain=1 + _jitter(rng, LIGHT_GAIN),
            spot=(0.35 * CANVAS[0] + _jitter(rng, 30), 0.3 * CANVAS[1] + _jitter(rng, 20)),
        ),
        parts=parts,
        texture=int(rng.integers(2**32)),
    )


# -------------------------------------------------------------------------------------------------- rendering


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


# -------------------------------------------------------------------------------------------------- anomalies

Region = Callable[[Canvas], BoolArray]
Edit = tuple[Scene, Region]


@dataclass(frozen=True)
class Kind:
    """One kind of anomaly.

    `apply(scene, rng)` returns the edited scene and its defective region, or None where this scene leaves no
    room for it. `saturates` is a part whose area is the saturation threshold; None stands for a relative
    threshold of 1.
    """

    name: str
    apply: Callable[[Scene, np.random.Generator], Edit | None]
    saturates: Part | None = None


def _place(canvas: Canvas, window, values: NDArray) -> NDArray:
    full = np.zeros((canvas.size[1], canvas.size[0]), values.dtype)
    full[window] = values
    return full


def silhouette(part: Part, bag: Pose, canvas: Canvas) -> FloatArray:
    """Share of each pixel that the part covers, (H, W) in [0, 1]."""
    window, x, y = _part_window(part, bag, canvas)
    alpha = part.surface(x, y, 1 / (canvas.scale * SUPERSAMPLING)).alpha
    return _place(canvas, window, _downsample(alpha.astype(np.float32)))


def _silhouettes(parts: list[Part], bag: Pose) -> Region:
    def region(canvas: Canvas) -> BoolArray:
        return np.logical_or.reduce([silhouette(part, bag, canvas) >= 0.5 for part in parts])

    return region


def _painted(mark: Mark, bag: Pose) -> Region:
    def region(canvas: Canvas) -> BoolArray:
        window, x, y = _mark_window(mark, bag, canvas)
        return _place(canvas, window, mark.coverage(x, y, 1 / canvas.scale) >= MASK_COVERAGE)

    return region


def _swap(scene: Scene, old: Part, new: Part) -> Scene:
    return replace(scene, parts=tuple(new if part is old else part for part in scene.parts))


def _others(scene: Scene, part: Part) -> tuple[Part, ...]:
    return tuple(other for other in scene.parts if other is not part)


def _pick(scene: Scene, rng: np.random.Generator, kind: type) -> Part:
    candidates = [part for part in scene.parts if isinstance(part, kind)]
    return candidates[rng.integers(len(candidates))]


def _add_mark(scene: Scene, mark: Mark) -> Edit:
    return replace(scene, marks=(*scene.marks, mark)), _painted(mark, scene.bag)


def _random_spot(rng: np.random.Generator, margin: float) -> Pose:
    left, top, right, bottom = INTERIOR
    return Pose(
        float(rng.uniform(left + margin, right - margin)),
        float(rng.uniform(top + margin, bottom - margin)),
        float(rng.uniform(0, 2 * math.pi)),
    )


def _curve(rng: np.random.Generator, length: float, wander: float) -> tuple[tuple[float, float], ...]:
    """A smoothly wandering polyline around the origin; `wander` is how far its heading turns, in radians."""
    steps = 28
    way = np.linspace(0, 1, steps)
    heading = sum(wander * rng.normal() / k * np.sin(math.pi * k * way + rng.uniform(0, 6)) for k in (1, 2, 3))
    x = np.cumsum(np.cos(heading)) * length / steps
    y = np.cumsum(np.sin(heading)) * length / steps
    return tuple(zip((x - x.mean()).tolist(), (y - y.mean()).tolist(), strict=True))


def _bag_scratch(scene: Scene, rng: np.random.Generator) -> Edit:
    course = _curve(rng, float(rng.uniform(75, 110)), 0.35)
    strands = [course]
    for side in (-1, 1):
        first, count = rng.integers(0, 14), rng.integers(8, 15)
        offset = side * rng.uniform(4.5, 6.5)
        strands.append(tuple((x, y + offset) for x, y in course[first : first + count]))
    return _add_mark(scene, Lines(_random_spot(rng, 50), tuple(strands), 2.6, (0.62, 0.63, 0.65)))


def _foreign_fibre(scene: Scene, rng: np.random.Generator) -> Edit:
    colours = ((0.16, 0.015, 0.015), (0.01, 0.03, 0.16), (0.012, 0.012, 0.014))
    course = _curve(rng, float(rng.uniform(85, 120)), 1.6)
    return _add_mark(scene, Lines(_random_spot(rng, 55), (course,), 3.2, colours[rng.integers(len(colours))]))


def _contamination(scene: Scene, rng: np.random.Generator) -> Edit:
    colours = ((0.012, 0.010, 0.008), (0.14, 0.045, 0.012), (0.045, 0.035, 0.010))
    waves = tuple((float(rng.uniform(0.03, 0.16)), float(rng.uniform(0, 2 * math.pi))) for _ in range(4))
    blob = Blob(_random_spot(rng, 25), float(rng.uniform(10, 15)), waves, colours[rng.integers(len(colours))])
    return _add_mark(scene, blob)


def _bag_tear(scene: Scene, rng: np.random.Generator) -> Edit:
    length, width = float(rng.uniform(45, 65)), float(rng.uniform(13, 18))
    return _add_mark(scene, Tear(_random_spot(rng, 40), length, width, float(rng.uniform(0, 6))))


def _screw_bent(scene: Scene, rng: np.random.Generator) -> Edit | None:
    screw = _pick(scene, rng, Screw)
    angle = float(rng.choice([-1, 1]) * rng.uniform(math.radians(24), math.radians(34)))
    bend = Bend(float(rng.uniform(-0.12, 0.05)) * screw.length, angle)
    bent = replace(screw, bend=bend)
    if not _fits(bent, _others(scene, screw)):
        return None

    def region(canvas: Canvas) -> BoolArray:
        # Where the shank has gone and where it should have been.
        changed = np.zeros((canvas.size[1], canvas.size[0]), bool)
        for state in (screw, bent):
            window, x, y = _part_window(state, scene.bag, canvas)
            behind = state.surface(x, y, 1 / (canvas.scale * SUPERSAMPLING)).alpha * state.past_bend(x, y, bend)
            changed[window] |= _downsample(behind.astype(np.float32)) >= 0.5
        return changed

    return _swap(scene, screw, bent), region


def _screw_rust(scene: Scene, rng: np.random.Generator) -> Edit:
    screw = _pick(scene, rng, Screw)
    start = float(rng.uniform(-0.3, 0.0)) * screw.length
    rust = Rust(start, start + float(rng.uniform(38, 50)), float(rng.uniform(0, 6)))
    rusty = replace(screw, rust=rust)

    def region(canvas: Canvas) -> BoolArray:
        window, x, y = _part_window(rusty, scene.bag, canvas)
        surface = rusty.surface(x, y, 1 / (canvas.scale * SUPERSAMPLING))
        stained = _downsample((surface.alpha * surface.stain).astype(np.float32))
        return _place(canvas, window, stained >= MASK_COVERAGE)

    return _swap(scene, screw, rusty), region


def _broken(scene: Scene, whole: Part, rest: Part) -> Edit:
    def region(canvas: Canvas) -> BoolArray:
        return silhouette(whole, scene.bag, canvas) - silhouette(rest, scene.bag, canvas) >= 0.5

    return _swap(scene, whole, rest), region


def _washer_broken(scene: Scene, rng: np.random.Generator) -> Edit:
    washer = _pick(scene, rng, Washer)
    gap = Gap(float(rng.uniform(0, 2 * math.pi)), math.radians(rng.uniform(55, 85)), float(rng.uniform(0, 6)))
    return _broken(scene, washer, replace(washer, gap=gap))


def _nut_broken(scene: Scene, rng: np.random.Generator) -> Edit:
    nut = _pick(scene, rng, Nut)
    chip = Chip(float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(7, 11)), float(rng.uniform(0, 6)))
    return _broken(scene, nut, replace(nut, chip=chip))


def _missing(prefix: str, scene: Scene, rng: np.random.Generator) -> Edit:
    candidates = [part for part in scene.parts if part.slot.startswith(prefix)]
    part = candidates[rng.integers(len(candidates))]
    rest = _others(scene, part)
    home_x, home_y = HOMES[part.slot]
    if isinstance(part, Screw):
        half_x = SCREW_SHIFT[0] + part.length / 2
        half_y = SCREW_SHIFT[1] + part.length / 2 * math.sin(SCREW_TILT) + HEAD_RADIUS
    else:
        half_x, half_y = (shift + WASHER_OUTER for shift in SMALL_PART_SHIFT)

    def region(canvas: Canvas) -> BoolArray:
        # Everywhere the part could have been, less what other parts occupy.
        u, v = scene.bag.to_inner(*canvas.grid())
        zone = (np.abs(u - home_x) <= half_x) & (np.abs(v - home_y) <= half_y)
        for other in rest:
            zone &= silhouette(other, scene.bag, canvas) < 0.5
        return zone

    return replace(scene, parts=rest), region


def _add_part(scene: Scene, part: Part, box: tuple[float, float, float, float]) -> Edit | None:
    if not _fits(part, scene.parts, box):
        return None
    edited = replace(scene, parts=(*scene.parts, part))
    # Nothing tells which one is the surplus one.
    alike = [p for p in edited.parts if _identity(p) == _identity(part)]
    return edited, _silhouettes(alike, scene.bag)


def _extra_small(kind: type, scene: Scene, rng: np.random.Generator) -> Edit | None:
    left, top, right, bottom = SMALL_PARTS
    for _ in range(20):
        pose = Pose(
            float(rng.uniform(left, right)),
            float(rng.uniform(top, bottom)),
            float(rng.uniform(0, 2 * math.pi)),
        )
        edit = _add_part(scene, kind("", pose), SMALL_PARTS)
        if edit is not None:
            return edit
    return None


def _extra_screw(scene: Scene, rng: np.random.Generator) -> Edit | None:
    left, top, _, bottom = INTERIOR
    for _ in range(20):
        pose = Pose(float(rng.uniform(left, 0)), float(rng.uniform(top, bottom)), _jitter(rng, SCREW_TILT))
        edit = _add_part(scene, Screw("", pose, SHORT), INTERIOR)
        if edit is not None:
            return edit
    return None


def _exchange_screw(slot: str, length: float, scene: Scene, rng: np.random.Generator) -> Edit | None:
    """Put a screw of the other regular length into a slot, so that both are alike."""
    screw = next(part for part in scene.parts if part.slot == slot)
    wrong = replace(screw, length=length)
    if not _fits(wrong, _others(scene, screw)):
        return None
    edited = _swap(scene, screw, wrong)
    return edited, _silhouettes([part for part in edited.parts if isinstance(part, Screw)], scene.bag)


def _odd_screw(slots: tuple[str, ...], length: float, scene: Scene, rng: np.random.Generator) -> Edit | None:
    """Put a screw of a length that no good bag has into one of the slots, its head where the other's was."""
    slot = slots[rng.integers(len(slots))]
    screw = next(part for part in scene.parts if part.slot == slot)
    middle = screw.pose.to_outer((length - screw.length) / 2, 0.0)
    wrong = replace(screw, length=length, pose=Pose(*middle, screw.pose.angle))
    if not _fits(wrong, _others(scene, screw)):
        return None
    return _swap(scene, screw, wrong), _silhouettes([wrong], scene.bag)


def _area(part: Part) -> float:
    """Area of a part in square scene units, counted on a fine grid."""
    fine = Canvas((int(2 * CANVAS[0]), int(2 * CANVAS[1])))
    spacing = 1 / (fine.scale * SUPERSAMPLING)
    _, x, y = _part_window(part, Pose(CANVAS[0] / 2, CANVAS[1] / 2), fine)
    return float(part.surface(x, y, spacing).alpha.sum()) * spacing**2


_ORIGIN = Pose(0.0, 0.0)
_LONG_SCREW, _SHORT_SCREW = Screw("", _ORIGIN, LONG), Screw("", _ORIGIN, SHORT)
_NUT, _WASHER = Nut("", _ORIGIN), Washer("", _ORIGIN)

# Order matters twice: pixel values count down from 255, and images take the kinds in turn.
STRUCTURAL = (
    Kind("contamination", _contamination),
    Kind("screw_bent", _screw_bent),
    Kind("bag_tear", _bag_tear),
    Kind("washer_broken", _washer_broken),
    Kind("screw_rust", _screw_rust),
    Kind("bag_scratch", _bag_scratch),
    Kind("nut_broken", _nut_broken),
    Kind("foreign_fibre", _foreign_fibre),
)
LOGICAL = (
    Kind("nut_missing", partial(_missing, "nut"), _NUT),
    Kind("washer_extra", partial(_extra_small, Washer), _WASHER),
    Kind("screws_both_long", partial(_exchange_screw, "screw_short", LONG), _LONG_SCREW),
    Kind("screw_long_missing", partial(_missing, "screw_long"), _LONG_SCREW),
    Kind("washer_missing", partial(_missing, "washer"), _WASHER),
    Kind("screws_both_short", partial(_exchange_screw, "screw_long", SHORT), _SHORT_SCREW),
    Kind("nut_extra", partial(_extra_small, Nut), _NUT),
    Kind("screw_short_missing", partial(_missing, "screw_short"), _SHORT_SCREW),
    Kind("screw_medium", partial(_odd_screw, ("screw_long", "screw_short"), MEDIUM)),
    Kind("screw_short_extra", _extra_screw, _SHORT_SCREW),
    Kind("screw_overlong", partial(_odd_screw, ("screw_long",), OVERLONG)),
)
PIXEL_VALUES = {kind.name: 255 - i for i, kind in enumerate(STRUCTURAL + LOGICAL)}


def defects_config(size: tuple[int, int]) -> list[dict[str, object]]:
    """The content of defects_config.json for images of `size` = (width, height) in pixels."""
    scale = Canvas(size).scale
    return [
        {
            "defect_name": kind.name,
            "pixel_value": PIXEL_VALUES[kind.name],
            "saturation_threshold": 1.0 if kind.saturates is None else round(_area(kind.saturates) * scale**2),
            "relative_saturation": kind.saturates is None,
        }
        for kind in STRUCTURAL + LOGICAL
    ]


# ------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Case:
    """One image of the category: where it goes and which defects it gets."""

    folder: str
    index: int
    kinds: tuple[Kind, ...] = ()

    @property
    def image(self) -> Path:
        return Path(self.folder, f"{self.index:03d}.png")

    def masks(self) -> list[Path]:
        defect_type = Path(self.folder).name
        return [Path("ground_truth", defect_type, f"{self.index:03d}", f"{k:03d}.png") for k in range(len(self.kinds))]


_COARSE = Canvas((int(CANVAS[0]), int(CANVAS[1])))

FOLDERS = (
    "train/good",
    "validation/good",
    "test/good",
    "test/structural_anomalies",
    "test/logical_anomalies",
)


def plan(counts: tuple[int, int, int, int, int]) -> list[Case]:
    """All images for the given numbers of training, validation, good, structural and logical test images."""
    cases = [Case(folder, i) for folder, count in zip(FOLDERS[:3], counts[:3], strict=True) for i in range(count)]
    for i in range(counts[3]):
        kinds = (STRUCTURAL[i % len(STRUCTURAL)],)
        if i % 6 == 5:
            # Some images carry a second, independent defect, as some of LOCO's do.
            kinds += (STRUCTURAL[0],) if kinds[0] is not STRUCTURAL[0] else (STRUCTURAL[2],)
        cases.append(Case(FOLDERS[3], i, kinds))
    cases += [Case(FOLDERS[4], i, (LOGICAL[i % len(LOGICAL)],)) for i in range(counts[4])]
    return cases


def compose(case: Case, seed: int) -> tuple[Scene, Scene, list[Region]]:
    """Describe an image.

    Returns:
        The good scene, the scene with the case's defects (the same if there are none), one region per defect.

    A region is a function of a `Canvas` that returns a boolean mask of shape (H, W).
    """
    rng = np.random.default_rng([seed, FOLDERS.index(case.folder), case.index])
    for _ in range(ATTEMPTS):
        good = scene = sample_scene(rng)
        regions = []
        for kind in case.kinds:
            edit = kind.apply(scene, rng)
            if edit is None:
                break
            scene, region = edit
            regions.append(region)
        else:
            if len(regions) < 2 or not np.logical_and(*(region(_COARSE) for region in regions)).any():
                return good, scene, regions
    raise RuntimeError(f"no scene found with room for {[kind.name for kind in case.kinds]}")


def _write_case(folder: Path, size: tuple[int, int], seed: int, case: Case) -> None:
    _, scene, regions = compose(case, seed)
    # The noise leaves little to compress, so a higher level would cost time and save nothing.
    Image.fromarray(render(scene, size)).save(folder / case.image, compress_level=1)
    canvas = Canvas(size)
    for path, kind, region in zip(case.masks(), case.kinds, regions, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        mask = region(canvas).astype(np.uint8) * PIXEL_VALUES[kind.name]
        Image.fromarray(mask.astype(np.uint8)).save(folder / path)


def _whole_number(name: str, value: object, low: int, high: int | None) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limits = f"from {low} up" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} is {value!r} but must be a whole number {limits}: give one.")
    return number


def _reuse(target: Path, manifest: dict[str, object], cases: list[Case]) -> Path:
    try:
        found = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if found != manifest:
        whose = (
            "was not made by this command" if found is None else "was made with other parameters or by another version"
        )
        raise UserError(f"{target} exists already and {whose}: delete it or choose another folder.")
    expected = [case.image for case in cases] + [mask for case in cases for mask in case.masks()]
    for path in (*expected, Path("defects_config.json")):
        if not (target / path).is_file():
            raise UserError(f"{target} has lost its file {path}: delete the folder to have it made anew.")
    return target


def make_screw_bag(
    root: Path,
    *,
    n_train: int,
    n_validation: int,
    n_test_good: int,
    n_structural: int,
    n_logical: int,
    size: tuple[int, int] = (480, 336),
    seed: int = 0,
) -> Path:
    """Write the synthetic category `screw_bag` in the layout of MVTec LOCO AD.

    The same parameters give the same bytes, however many threads draw (with one version of numpy, scipy and
    Pillow on one kind of processor). The folder appears under its name only when it is complete. A folder
    that this function made with the same parameters is kept as it is.

    Args:
        root: folder that gets the subfolder `screw_bag`; made if it does not exist.
        n_train: number of images in train/good, 1 to 1000.
        n_validation: number of images in validation/good, 0 to 1000.
        n_test_good: number of images in test/good, 0 to 1000.
        n_structural: number of images in test/structural_anomalies, 0 to 1000; the kinds take turns.
        n_logical: number of images in test/logical_anomalies, 0 to 1000; the kinds take turns.
        size: (width, height) of the images in pixels, 96 to 2048 each, in any ratio.
        seed: whole number from 0 up.

    Returns:
        The category's folder, `root/screw_bag`. A folder for which no images were asked is not made.

    Raises:
        UserError: if an argument is out of range, the folder exists and was not made by this function with
            the same parameters, or the disk cannot be written.
    """
    counts = {
        "n_train": _whole_number("n_train", n_train, 1, COUNT_LIMIT),
        "n_validation": _whole_number("n_validation", n_validation, 0, COUNT_LIMIT),
        "n_test_good": _whole_number("n_test_good", n_test_good, 0, COUNT_LIMIT),
        "n_structural": _whole_number("n_structural", n_structural, 0, COUNT_LIMIT),
        "n_logical": _whole_number("n_logical", n_logical, 0, COUNT_LIMIT),
    }
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise UserError(f"size is {size!r} but must be a pair (width, height) in pixels: give two whole numbers.")
    width, height = (_whole_number(f"size[{axis}]", side, *SIZE_LIMITS) for axis, side in enumerate(size))
    seed = _whole_number("seed", seed, 0, None)

    root = Path(root)
    target = root / CATEGORY
    cases = plan(tuple(counts.values()))
    manifest = {"made_by": "dskd-fast", "version": VERSION, **counts, "size": [width, height], "seed": seed}
    if os.path.lexists(target):
        return _reuse(target, manifest, cases)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{CATEGORY}-", dir=root) as scratch:
            # A folder inside, because the temporary one itself is private to the user.
            folder = Path(scratch, CATEGORY)
            for name in sorted({case.folder for case in cases}):
                (folder / name).mkdir(parents=True)
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(partial(_write_case, folder, (width, height), seed), cases))
            config = json.dumps(defects_config((width, height)), indent=2)
            (folder / "defects_config.json").write_text(config + "\n", encoding="utf-8")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            try:
                folder.rename(target)
            except OSError:
                if not os.path.lexists(target):
                    raise
                # Someone else was faster.
                return _reuse(target, manifest, cases)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): choose a folder that can be written."
        ) from error
    return target
