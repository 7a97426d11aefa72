"""The kinds of anomaly: each edits a description and says which region is then defective."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dskd_fast.data.synthetic.rendering import SUPERSAMPLING, Canvas, _downsample, _mark_window, _part_window
from dskd_fast.data.synthetic.scene import (
    CANVAS,
    HEAD_RADIUS,
    HOMES,
    INTERIOR,
    LONG,
    MEDIUM,
    OVERLONG,
    SCREW_SHIFT,
    SCREW_TILT,
    SHORT,
    SMALL_PART_SHIFT,
    SMALL_PARTS,
    WASHER_OUTER,
    Bend,
    Blob,
    BoolArray,
    Chip,
    FloatArray,
    Gap,
    Lines,
    Mark,
    Nut,
    Part,
    Pose,
    Rust,
    Scene,
    Screw,
    Tear,
    Washer,
    _fits,
    _identity,
    _jitter,
)

# A pixel belongs to a painted defect from this coverage on; with one half, thin lines would fall apart.
MASK_COVERAGE = 0.25

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
