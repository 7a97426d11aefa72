"""What an image shows: the bag, the parts and marks in it, and how much one good bag differs from the next.

Lengths are in scene units. The canvas is 480 x 336 units, fitted into the image without distortion; x runs to the
right, y downwards, angles turn clockwise. Parts and marks are placed in the frame of the bag: origin in its middle,
moving with it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

SCREW_TILT = math.radians(15.0)  # half-range
LONG, SHORT = 172.0, 112.0
HEAD_RADIUS, SHANK_RADIUS = 17.0, 7.0
NUT_APOTHEM, NUT_BORE = 21.5, 11.5
WASHER_OUTER, WASHER_INNER = 25.0, 12.0
PART_GAP = 4.0
CANVAS = (480.0, 336.0)
BAG_HALF = (214.0, 146.0)
INTERIOR = (-199.0, -94.0, 199.0, 130.0)  # left, top, right, bottom of where parts may lie
LIGHT_AZIMUTH = math.radians(-125.0)  # from the upper left

FloatArray = NDArray[np.float32]


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
class Bend:
    """A kink of `angle` in a screw's axis at `start`."""

    start: float
    angle: float

    def straighten(self, x, y):
        """Map points of the bent screw's plane to where they were on the straight one."""
        # The two halves meet in the line that halves the angle between them, like a frame's in its corner.
        beyond = (x - self.start) * math.cos(self.angle / 2) + y * math.sin(self.angle / 2) > 0
        along, across = Pose(self.start, 0.0, self.angle).to_inner(x, y)
        return np.where(beyond, self.start + along, x), np.where(beyond, across, y)

    def axis(self, x: float) -> tuple[float, float]:
        """Where the point (x, 0) of the straight screw's axis goes."""
        return Pose(self.start, 0.0, self.angle).to_outer(x - self.start, 0.0) if x > self.start else (x, 0.0)


@dataclass(frozen=True)
class Chip:
    """What lies beyond a ragged line at `distance` from the middle, in direction `angle`, has broken off."""

    angle: float
    distance: float
    phase: float

    def kept(self, x, y):
        """Distance from the line, positive on the side that is left."""
        beyond, along = Pose(0.0, 0.0, self.angle).to_inner(x, y)
        ragged = 1.6 * np.sin(0.55 * along + self.phase) + 0.9 * np.sin(1.4 * along + 3 * self.phase)
        return self.distance + ragged - beyond


@dataclass(frozen=True)
class Screw:
    """Countersunk cross-head screw lying on its side, head towards -x, seen slightly from the head's end."""

    pose: Pose
    length: float
    damage: Bend | None = None

    tint = (1.30, 1.08, 0.66)
    shift = 12.0  # half-range of its place, both ways
    reach = LONG / 2 + 4

    def surface(self, x, y, pixel: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """What it looks like from above at points of its frame, each of their shape.

        Returns coverage in [0, 1], relief in scene units, and a factor on the metal's colour.
        """
        if self.damage is not None:
            x, y = self.damage.straighten(x, y)
        face, tip = 6.5 - self.length / 2, self.length / 2
        profile = (HEAD_RADIUS, SHANK_RADIUS - 1, SHANK_RADIUS - 1, 0.5)
        radius = np.interp(x, (face, face + 13, tip - 20, tip), profile).astype(np.float32)
        thread = 2 * np.abs(2 * np.mod((x + 0.3 * y) / 7.0, 1) - 1) - 1
        depth = 1.9 * np.clip((x - face - 20) / 6, 0, 1) * np.clip((tip - x) / 14, 0, 1)
        radius = radius + depth * thread
        body = np.minimum(radius - np.abs(y), np.minimum(x - face, tip - x))
        # The head's face is a circle, foreshortened along x to an ellipse, with a recess in the shape of a cross.
        u = (x - face) * (HEAD_RADIUS / 6.5)
        from_middle = np.hypot(u, y)
        on_face = from_middle < HEAD_RADIUS
        head = (HEAD_RADIUS - from_middle) * np.where(np.abs(x - face) > 4, 6.5 / HEAD_RADIUS, 1.0)
        alpha = np.clip(np.maximum(body, head) / pixel + 0.5, 0, 1)
        height = np.where(on_face, 0.75 * (x - face) + HEAD_RADIUS * 0.6, np.sqrt(np.maximum(radius**2 - y**2, 0.04)))
        arm = np.minimum(np.maximum(np.abs(u) - 10.5, np.abs(y) - 3.0), np.maximum(np.abs(y) - 10.5, np.abs(u) - 3.0))
        recess = np.where(on_face, np.clip(0.5 - arm / 2.0, 0, 1), 0)
        # Grooves of the thread see less of the light than its crests.
        return alpha, height, (1 - 0.78 * recess) * (1 + 0.22 * thread * np.minimum(depth, 1))

    def discs(self) -> list[tuple[float, float, float]]:
        """Circles (x, y, radius) in the bag's frame that cover the part, for collision tests."""
        face = 6.5 - self.length / 2
        axis = [(face, HEAD_RADIUS)]
        axis += [(x, SHANK_RADIUS + 2) for x in np.arange(face + 12, self.length / 2 - 3, 6.0)]
        bent = [((x, 0.0) if self.damage is None else self.damage.axis(x), r) for x, r in axis]
        return [(*self.pose.to_outer(*point), r) for point, r in bent]


@dataclass(frozen=True)
class _FlatPart:
    pose: Pose
    damage: Chip | None = None

    shift = 20.0
    reach: ClassVar[float]

    def _relief(self, x, y, rho):
        """Distance inwards from the edge, height, and the factor on the metal's colour; `rho` is hypot(x, y)."""
        raise NotImplementedError

    def surface(self, x, y, pixel: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        edge, height, albedo = self._relief(x, y, np.hypot(x, y))
        if self.damage is not None:
            kept = self.damage.kept(x, y)
            edge = np.minimum(edge, kept)
            albedo = albedo * np.where(kept < 3.0, 0.55, 1.0)
        return np.clip(edge / pixel + 0.5, 0, 1), height, albedo

    def discs(self) -> list[tuple[float, float, float]]:
        return [(self.pose.x, self.pose.y, self.reach - 2)]


class Nut(_FlatPart):
    """Hexagonal nut with chamfered corners and a threaded bore, lying flat."""

    tint = (0.86, 0.88, 0.92)
    reach = NUT_APOTHEM / math.cos(math.pi / 6) + 2

    def _relief(self, x, y, rho):
        hexagon = np.maximum(np.abs(y), np.abs(0.5 * y + (math.sqrt(3) / 2) * x))
        hexagon = np.maximum(hexagon, np.abs(0.5 * y - (math.sqrt(3) / 2) * x))
        edge = np.minimum(NUT_APOTHEM - hexagon, rho - (NUT_BORE - 2.5))
        height = 9 - 0.75 * np.maximum(rho - NUT_APOTHEM + 2.0, 0) - 1.1 * np.maximum(hexagon - NUT_APOTHEM + 1.5, 0)
        height = height - 0.7 * np.maximum(NUT_BORE + 2.5 - rho, 0) - 1.8 * np.maximum(NUT_BORE - rho, 0)
        return edge, height, np.where(rho < NUT_BORE, 0.45 + 0.2 * np.sin(5.0 * rho), 1.0)


class Washer(_FlatPart):
    """Flat ring with rounded edges and concentric machining marks."""

    tint = (0.86, 0.85, 0.83)
    reach = WASHER_OUTER + 2

    def _relief(self, x, y, rho):
        edge = np.minimum(WASHER_OUTER - rho, rho - WASHER_INNER)
        height = 3 - 0.3 * np.maximum(1.8 - edge, 0) ** 2
        # Turned metal glints in the two sectors that lie towards and away from the light.
        sector = np.arctan2(y, x) + self.pose.angle - LIGHT_AZIMUTH
        return edge, height, 0.92 + 0.3 * np.cos(2 * sector) + 0.06 * np.sin(2.6 * rho)


Part = Screw | Nut | Washer

# What a good bag holds, each part in the middle of its range.
PARTS: dict[str, Part] = {
    "screw_long": Screw(Pose(-99.0, -42.0), LONG),
    "screw_short": Screw(Pose(-99.0, 60.0), SHORT),
    "nut_upper": Nut(Pose(62.0, -44.0)),
    "nut_lower": Nut(Pose(62.0, 72.0)),
    "washer_upper": Washer(Pose(148.0, -44.0)),
    "washer_lower": Washer(Pose(148.0, 72.0)),
}


@dataclass(frozen=True)
class Mark:
    """A spot on the film with an irregular outline: a drop of that colour, or without colour a hole with a bright lip.

    `radii` are half its length and half its width, `waves` amplitude and phase of the outline's harmonics from the
    second on.
    """

    pose: Pose
    radii: tuple[float, float]
    waves: tuple[tuple[float, float], ...]
    colour: tuple[float, float, float] | None = None

    @property
    def reach(self) -> float:
        return max(self.radii) * (1 + sum(amplitude for amplitude, _ in self.waves)) + 2

    def _depth(self, x, y):
        """Distance inwards from the outline, exact where that is a circle."""
        phi = np.arctan2(y / self.radii[1], x / self.radii[0])
        outline = 1 + sum(a * np.cos(k * phi + p) for k, (a, p) in enumerate(self.waves, start=2))
        return min(self.radii) * (outline - np.hypot(x / self.radii[0], y / self.radii[1]))

    def coverage(self, x, y, pixel: float) -> FloatArray:
        return np.clip(self._depth(x, y) / pixel + 0.5, 0, 1)

    def paint(self, x, y, pixel: float, film: FloatArray, bare: FloatArray) -> FloatArray:
        """The film's colours with the mark on it; `bare` is what lies behind the film. All are (h, w, 3)."""
        depth, (rx, ry) = self._depth(x, y), self.radii
        if self.colour is None:
            # The lip throws a narrow shadow onto what is behind it.
            behind = bare * (1 - 0.55 * np.exp(-np.maximum(depth - 2.6, 0) / 3.0))[..., None]
            lip = 0.2 * film + 0.8 * (0.42 + 0.3 * np.clip(-y / (2 * ry), -1, 1))[..., None]
            inside = lip + np.clip((depth - 2.6) / pixel + 0.5, 0, 1)[..., None] * (behind - lip)
        else:
            glint = np.exp(-((x / rx + 0.35) ** 2 + (y / ry + 0.35) ** 2) / 0.12)
            inside = 0.07 * film + 0.93 * (np.asarray(self.colour, np.float32) + 0.22 * glint[..., None])
        return film + self.coverage(x, y, pixel)[..., None] * (inside - film)


@dataclass(frozen=True)
class Scene:
    """Everything that `render` draws; `texture` seeds table, creases, film and camera noise."""

    bag: Pose
    light: tuple[float, float, float]  # unit vector towards the light; z points to the camera
    gain: float
    spot: tuple[float, float]  # where on the canvas it is brightest
    parts: Mapping[str, Part]  # by slot
    texture: int
    marks: tuple[Mark, ...] = ()


def fits(part: Part, others: Iterable[Part]) -> bool:
    """Whether the part lies inside the bag and apart from all others."""
    left, top, right, bottom = INTERIOR
    x, y, r = np.array(part.discs()).T
    if (x - r).min() < left or (x + r).max() > right or (y - r).min() < top or (y + r).max() > bottom:
        return False
    apart = [np.hypot(x - ox, y - oy) - r - rest for other in others for ox, oy, rest in other.discs()]
    return not apart or np.min(apart) >= PART_GAP


def _moved(part: Part, rng: np.random.Generator) -> Part:
    shift = part.shift
    if isinstance(part, Screw):
        # The second number is not used: without it a seed would give other images than it always has.
        angle, _, dx, dy = rng.uniform((-SCREW_TILT, 0, -shift, -shift), (SCREW_TILT, 1, shift, shift)).tolist()
    else:
        dx, dy, angle = rng.uniform((-shift, -shift, 0), (shift, shift, 2 * math.pi)).tolist()
    return replace(part, pose=Pose(part.pose.x + dx, part.pose.y + dy, angle))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Describe one good bag: a long and a short screw, two nuts, two washers, no two of them touching."""
    parts: dict[str, Part] = {}
    while len(parts) < len(PARTS):
        slot = list(PARTS)[len(parts)]
        part = _moved(PARTS[slot], rng)
        # One that does not fit begins the bag anew: to move it alone would favour crowded bags.
        parts = {**parts, slot: part} if fits(part, parts.values()) else {}
    half_ranges = np.array((14, 10, math.radians(3), math.radians(20), math.radians(5), 0.15, 30, 20))
    x, y, tilt, turn, rise, gain, spot_x, spot_y = rng.uniform(-half_ranges, half_ranges).tolist()
    azimuth, elevation = LIGHT_AZIMUTH + turn, math.radians(50) + rise
    flat = math.cos(elevation)
    return Scene(
        bag=Pose(CANVAS[0] / 2 + x, CANVAS[1] / 2 + y, tilt),
        light=(flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)),
        gain=1 + gain,
        spot=(0.35 * CANVAS[0] + spot_x, 0.3 * CANVAS[1] + spot_y),
        parts=parts,
        texture=int(rng.integers(2**32)),
    )
