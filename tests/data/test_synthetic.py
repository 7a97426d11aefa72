import os
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import make_screw_bag
from dskd_fast.data.synthetic.anomalies import LOGICAL, STRUCTURAL
from dskd_fast.data.synthetic.dataset import FOLDERS, Case, compose, defects_config, plan
from dskd_fast.data.synthetic.rendering import Canvas, coverage, render
from dskd_fast.data.synthetic.scene import BAG_HALF, LONG, SHORT
from dskd_fast.errors import UserError

SIZE = (150, 110)
COUNTS = {"n_train": 3, "n_validation": 2, "n_test_good": 1, "n_structural": 5, "n_logical": 5}
FEW = {"n_train": 2, "n_validation": 0, "n_test_good": 0, "n_structural": 1, "n_logical": 0}

KINDS = [pytest.param(kind, id=kind.name) for kind in STRUCTURAL + LOGICAL]
# What a logical anomaly does to the number of parts, and how many of them are then alike and marked.
CHANGES = {
    "nut_missing": ({"Nut": -1}, None),
    "washer_extra": ({"Washer": 1}, 3),
    "screws_both_long": ({LONG: 1, SHORT: -1}, 2),
    "screw_long_missing": ({LONG: -1}, None),
    "screws_both_short": ({LONG: -1, SHORT: 1}, 2),
}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@cache
def composed(kind, index):
    return compose(Case(FOLDERS[3] if kind in STRUCTURAL else FOLDERS[4], index, kind), 1)


def inventory(scene):
    return Counter(getattr(part, "length", type(part).__name__) for part in scene.parts.values())


def n_damaged(scene):
    return sum(part.damage is not None for part in scene.parts.values()) + len(scene.marks)


def metal(scene, size):
    return sum(coverage(part, scene.bag, Canvas(size)) for part in scene.parts.values())


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    return make_screw_bag(tmp_path_factory.mktemp("synthetic") / "größe 1", **COUNTS, size=SIZE, seed=3)


def test_the_layout_is_that_of_loco_and_every_kind_appears(category):
    assert os.listdir(category.parent) == ["screw_bag"]
    found = open_category(category.parent, "screw_bag")
    assert (found.layout, found.validation_source) == ("loco", "folder")
    assert list(found.n_images.values()) == list(COUNTS.values())
    defects = [defect for item in found.test for defect in found.defects(item)]
    assert sorted(defect.name for defect in defects) == sorted(kind.name for kind in STRUCTURAL + LOGICAL)
    assert len(contents(category)) == sum(COUNTS.values()) + len(defects) + 2
    assert {len(kinds) for kinds in (STRUCTURAL, LOGICAL)} == {5}


def test_a_seed_gives_the_same_bytes_for_any_number_of_threads_and_another_seed_others(category, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert contents(make_screw_bag(tmp_path / "single", **COUNTS, size=SIZE, seed=3)) == contents(category)
    other = make_screw_bag(tmp_path / "other", **FEW, size=SIZE, seed=4)
    images = [data for folder in (category, other) for name, data in contents(folder).items() if "good" in name]
    assert len(set(images)) == len(images) == 8
    assert sorted(os.listdir(other / "test")) == ["structural_anomalies"]  # no folders for no images


def test_good_bags_hold_the_exact_parts_inside_without_overlap_and_no_anomaly():
    for case in plan((6, 6, 6, 0, 0)):
        good, scene, region = compose(case, 0)
        assert (good, region) == (scene, None)
        assert inventory(scene) == {LONG: 1, SHORT: 1, "Nut": 2, "Washer": 2}
        assert n_damaged(scene) == 0
        cover = metal(scene, SIZE)
        assert cover.max() <= 1 + 1e-6
        u, v = scene.bag.to_inner(*Canvas(SIZE).grid())
        outside = (np.abs(u) > BAG_HALF[0]) | (np.abs(v) > BAG_HALF[1])
        assert cover[outside].max() == 0
        # The outline of the bag itself lies inside the image.
        assert all(edge.all() for edge in (outside[0], outside[-1], outside[:, 0], outside[:, -1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_structural_anomaly_damages_one_thing_and_a_logical_one_changes_the_parts(kind):
    change, n_marked = CHANGES.get(kind.name, ({}, None))
    for index in range(2):
        good, scene, region = composed(kind, index)
        assert n_damaged(scene) == (kind in STRUCTURAL)
        expected = inventory(good)
        expected.update(change)
        assert inventory(scene) == expected
        assert metal(scene, SIZE).max() <= 1 + 1e-6
        if n_marked:
            mask = region(Canvas((480, 336)))
            assert ndimage.label(mask, structure=np.ones((3, 3)))[1] == n_marked
            threshold = {e["defect_name"]: e["saturation_threshold"] for e in defects_config((480, 336))}[kind.name]
            assert mask.sum() == pytest.approx(n_marked * threshold, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_marks_the_place_that_differs_from_the_good_twin(kind):
    size = (240, 168)
    for index in range(2):
        good, scene, region = composed(kind, index)
        mask = region(Canvas(size))
        images = render(good, size), render(scene, size)
        change = np.abs(images[0].astype(int) - images[1]).max(axis=2)
        vanished = metal(good, size) - metal(scene, size) >= 0.5
        # A mark stops at its edge; a changed part also moves its shadow and the film on it (30 units).
        reach = 2 if scene.marks else 15
        near = ndimage.binary_dilation(mask | vanished, iterations=reach, structure=np.ones((3, 3)))
        assert change[~near].max() == 0
        if kind in STRUCTURAL:
            assert (change[mask] > 3).mean() > 0.8
            assert change[mask].mean() > 12
        elif kind.name.endswith("missing"):
            assert mask[vanished].all()
            assert metal(scene, size)[mask].max() < 0.5
        else:
            assert mask[metal(scene, size) - metal(good, size) >= 0.5].all()
        # At the size at which the demo trains, it is seen.
        small = [np.asarray(Image.fromarray(image).resize((128, 128)), int) for image in images]
        assert (np.abs(small[0] - small[1]).max(axis=2) > 15).sum() >= 8


def test_an_existing_folder_with_the_same_parameters_is_reused(tmp_path):
    made = make_screw_bag(tmp_path, **FEW, size=SIZE)
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    again = make_screw_bag(tmp_path, **{k: np.int64(v) for k, v in FEW.items()}, size=list(SIZE), seed=0)
    assert again == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    for change in ({"seed": 1}, {"size": (151, 110)}, {"n_train": 3}):
        with pytest.raises(UserError, match="other parameters"):
            make_screw_bag(tmp_path, **{**FEW, "size": SIZE, **change})
    for name, value in (("n_train", 0), ("size", 480)):
        with pytest.raises(UserError, match=rf"^{name}"):
            make_screw_bag(tmp_path / "new", **{**FEW, "size": SIZE, name: value})
    (made / "train/good/001.png").unlink()
    with pytest.raises(UserError, match=r"lost its file train.good.001\.png"):
        make_screw_bag(tmp_path, **FEW, size=SIZE)
    (made / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match="screw_bag exists already"):
        make_screw_bag(tmp_path, **FEW, size=SIZE)
    assert (made / "notes.txt").read_text(encoding="utf-8") == "mine"
