"""What a picture shows: the bag, the parts and marks in it, and how they vary."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

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

ATTEMPTS = 2000
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


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
