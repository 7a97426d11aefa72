"""The kinds of anomaly: each edits a description and says which region is then defective."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dskd_fast.data.synthetic import scene as scenes
from dskd_fast.data.synthetic.rendering import Canvas, coverage
from dskd_fast.data.synthetic.scene import PARTS, Bend, Chip, Mark, Part, Pose, Scene, Screw, fits

Region = Callable[[Canvas], NDArray[np.bool_]]
Edit = tuple[Scene, Region]
RNG = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """One kind of anomaly.

    `apply(scene, rng)` returns the edited scene and its defective region, or None where this scene leaves no room for
    it. `saturates` is a part whose area is the saturation threshold; None stands for a relative threshold of 1.
    """

    name: str
    apply: Callable[[Scene, RNG], Edit | None]
    saturates: Part | None = None


def _pick(scene: Scene, rng: RNG, prefix: str) -> tuple[str, Part]:
    slots = [slot for slot in scene.parts if slot.startswith(prefix)]
    slot = slots[rng.integers(len(slots))]
    return slot, scene.parts[slot]


def _without(scene: Scene, slot: str) -> dict[str, Part]:
    return {name: part for name, part in scene.parts.items() if name != slot}


def _anywhere(rng: RNG, margin: float = 0.0) -> Pose:
    left, top, right, bottom = scenes.INTERIOR
    low, high = (left + margin, top + margin, 0), (right - margin, bottom - margin, 2 * math.pi)
    return Pose(*rng.uniform(low, high).tolist())


def _mark(scene: Scene, rng: RNG, radii: tuple[float, float], waves: float, colour: tuple | None) -> Edit:
    outline = tuple((rng.uniform(0.03, waves), rng.uniform(0, 2 * math.pi)) for _ in range(4))
    mark = Mark(_anywhere(rng, max(radii) + 10), radii, outline, colour)
    return replace(scene, marks=(*scene.marks, mark)), lambda canvas: coverage(mark, scene.bag, canvas) >= 0.5


def _contamination(scene: Scene, rng: RNG) -> Edit:
    colours = ((0.012, 0.010, 0.008), (0.14, 0.045, 0.012), (0.045, 0.035, 0.010))
    return _mark(scene, rng, (rng.uniform(10, 15),) * 2, 0.16, colours[rng.integers(len(colours))])


def _bag_tear(scene: Scene, rng: RNG) -> Edit:
    return _mark(scene, rng, (rng.uniform(24, 34), rng.uniform(10, 13)), 0.13, None)


def _bent(whole: Part, rng: RNG) -> Part:
    assert isinstance(whole, Screw)
    bend = Bend(rng.uniform(-16, 6), float(rng.choice([-1, 1])) * math.radians(rng.uniform(24, 34)))
    return replace(whole, damage=bend)


def _chipped(whole: Part, rng: RNG) -> Part:
    assert not isinstance(whole, Screw)
    return replace(whole, damage=Chip(rng.uniform(0, 2 * math.pi), rng.uniform(7, 11), rng.uniform(0, 6)))


def _damaged(prefix: str, damage: Callable[[Part, RNG], Part], scene: Scene, rng: RNG) -> Edit | None:
    slot, whole = _pick(scene, rng, prefix)
    damaged = damage(whole, rng)
    if not fits(damaged, _without(scene, slot).values()):
        return None

    def region(canvas: Canvas) -> NDArray[np.bool_]:
        # Where there is metal that should not be, and where there should be metal and is none.
        return np.abs(coverage(damaged, scene.bag, canvas) - coverage(whole, scene.bag, canvas)) >= 0.5

    return replace(scene, parts={**scene.parts, slot: damaged}), region


def _missing(prefix: str, scene: Scene, rng: RNG) -> Edit:
    slot, gone = _pick(scene, rng, prefix)
    rest, home = _without(scene, slot), PARTS[slot].pose
    half_x = half_y = gone.shift + gone.reach
    if isinstance(gone, Screw):
        half_y = gone.shift + gone.length / 2 * math.sin(scenes.SCREW_TILT) + scenes.HEAD_RADIUS

    def region(canvas: Canvas) -> NDArray[np.bool_]:
        # Everywhere the part could have been, less what other parts occupy.
        u, v = scene.bag.to_inner(*canvas.grid())
        zone = (np.abs(u - home.x) <= half_x) & (np.abs(v - home.y) <= half_y)
        return zone & (sum(coverage(part, scene.bag, canvas) for part in rest.values()) < 0.5)

    return replace(scene, parts=rest), region


def _put(scene: Scene, slot: str, part: Part) -> Edit | None:
    """Put a wrong part into a slot. Which one of those alike is the wrong one cannot be seen, so all are the defect."""
    rest = _without(scene, slot)
    if not fits(part, rest.values()):
        return None
    alike = [part, *(other for other in rest.values() if replace(other, pose=part.pose) == part)]
    return (
        replace(scene, parts={**rest, slot: part}),
        lambda canvas: np.asarray(sum(coverage(item, scene.bag, canvas) for item in alike) >= 0.5),
    )


def _washer_extra(scene: Scene, rng: RNG) -> Edit | None:
    return _put(scene, "extra", replace(PARTS["washer_upper"], pose=_anywhere(rng)))


def _screws_alike(slot: str, length: float, scene: Scene, rng: RNG) -> Edit | None:
    screw = scene.parts[slot]
    assert isinstance(screw, Screw)
    return _put(scene, slot, replace(screw, length=length))


# Order matters twice: pixel values count down from 255, and images take the kinds in turn.
STRUCTURAL = (
    Kind("contamination", _contamination),
    Kind("screw_bent", partial(_damaged, "screw", _bent)),
    Kind("bag_tear", _bag_tear),
    Kind("washer_broken", partial(_damaged, "washer", _chipped)),
    Kind("nut_broken", partial(_damaged, "nut", _chipped)),
)
LOGICAL = (
    Kind("nut_missing", partial(_missing, "nut"), PARTS["nut_upper"]),
    Kind("washer_extra", _washer_extra, PARTS["washer_upper"]),
    Kind("screws_both_long", partial(_screws_alike, "screw_short", scenes.LONG), PARTS["screw_long"]),
    Kind("screw_long_missing", partial(_missing, "screw_long"), PARTS["screw_long"]),
    Kind("screws_both_short", partial(_screws_alike, "screw_long", scenes.SHORT), PARTS["screw_short"]),
)
