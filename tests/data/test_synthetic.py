import itertools
import math
import os
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import dataset, make_screw_bag
from dskd_fast.data.synthetic.anomalies import LOGICAL, STRUCTURAL
from dskd_fast.data.synthetic.dataset import FOLDERS, Case, compose, defects_config, plan
from dskd_fast.data.synthetic.rendering import Canvas, coverage, render
from dskd_fast.data.synthetic.scene import BAG_HALF, LONG, PARTS, SHORT, Pose
from dskd_fast.errors import UserError

SIZE = (150, 110)
COUNTS = {"n_train": 3, "n_validation": 2, "n_test_good": 1, "n_structural": 5, "n_logical": 5}
FEW = {"n_train": 2, "n_validation": 0, "n_test_good": 0, "n_structural": 1, "n_logical": 0}

KINDS = [pytest.param(kind, id=kind.name) for kind in STRUCTURAL + LOGICAL]
NORMAL_PARTS = {replace(part, pose=Pose(0, 0)) for part in PARTS.values()}
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


def are_normal(parts):
    return all(replace(part, pose=Pose(0, 0)) in NORMAL_PARTS for part in parts)


def inventory(scene):
    return Counter(getattr(part, "length", type(part).__name__) for part in scene.parts.values())


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


def test_files_hold_what_compose_and_render_give(category):
    for case in plan(tuple(COUNTS.values())):
        _, scene, region = compose(case, 3)
        image, *mask = (np.asarray(Image.open(category / file)) for file in case.files())
        assert np.array_equal(image, render(scene, SIZE))
        assert 40 < image.mean() < 200
        if case.kind is None:
            assert mask == []
        else:
            value = {entry["defect_name"]: entry["pixel_value"] for entry in defects_config(SIZE)}[case.kind.name]
            assert np.array_equal(mask[0], region(Canvas(SIZE)) * np.uint8(value))


def test_a_seed_gives_the_same_bytes_for_any_number_of_threads_and_another_seed_others(category, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert contents(make_screw_bag(tmp_path / "single", **COUNTS, size=SIZE, seed=3)) == contents(category)
    other = make_screw_bag(tmp_path / "other", **FEW, size=SIZE, seed=4)
    images = [data for folder in (category, other) for name, data in contents(folder).items() if "good" in name]
    assert len(set(images)) == len(images) == 8
    assert sorted(os.listdir(other / "test")) == ["structural_anomalies"]  # no folders for no images


def test_saturation_thresholds_are_the_areas_of_parts():
    config = {entry["defect_name"]: entry for entry in defects_config((480, 336))}
    assert len({entry["pixel_value"] for entry in config.values()}) == len(config)
    nut, washer = 2 * math.sqrt(3) * 21.5**2 - math.pi * 9.0**2, math.pi * (25.0**2 - 12.0**2)
    whole = {kind.name: 1.0 for kind in STRUCTURAL}
    for name, expected in {"nut_missing": nut, "washer_extra": washer, **whole}.items():
        assert config[name]["relative_saturation"] == (name in whole)
        assert config[name]["saturation_threshold"] == pytest.approx(expected, rel=0.005)


def test_good_bags_hold_the_exact_parts_inside_without_overlap_and_no_anomaly():
    for case in plan((6, 6, 6, 0, 0)):
        good, scene, region = compose(case, 0)
        assert (good, region) == (scene, None)
        assert are_normal(scene.parts.values())
        assert inventory(scene) == {LONG: 1, SHORT: 1, "Nut": 2, "Washer": 2}
        assert scene.marks == ()
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
        n_damaged = sum(part.damage is not None for part in scene.parts.values()) + len(scene.marks)
        assert n_damaged == (kind in STRUCTURAL)
        assert are_normal(scene.parts.values()) or n_damaged
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


@pytest.mark.parametrize("kind", KINDS)
def test_masks_exist_at_every_size_and_are_large_enough_to_saturate(kind):
    for size, index in itertools.product(((96, 96), (300, 130)), range(3)):
        entry = next(entry for entry in defects_config(size) if entry["defect_name"] == kind.name)
        mask = composed(kind, index)[2](Canvas(size))
        assert (mask.shape, mask.dtype) == (size[::-1], bool)
        assert 0 < mask.sum() < 0.25 * mask.size
        if not entry["relative_saturation"]:
            # Equality up to the raster: a mask may be the silhouette of one part.
            assert mask.sum() >= 0.9 * entry["saturation_threshold"]


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
    (made / "train/good/001.png").unlink()
    with pytest.raises(UserError, match=r"lost its file train.good.001\.png"):
        make_screw_bag(tmp_path, **FEW, size=SIZE)


@pytest.mark.parametrize("manifest", [None, "{", "[]", "\udcff", "[" * 100_000])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, manifest):
    target = tmp_path / "screw_bag"
    target.mkdir()
    (target / "photo.png").write_bytes(b"precious")
    if manifest is not None:
        (target / "synthetic.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="screw_bag exists already"):
        make_screw_bag(tmp_path, **FEW, size=SIZE)
    assert contents(tmp_path) == before


def test_a_file_or_a_dangling_link_in_the_way_is_refused(tmp_path):
    (tmp_path / "screw_bag").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for folder, message in ((tmp_path, "exists already"), (tmp_path / "file", "cannot write")):
        with pytest.raises(UserError, match=message):
            make_screw_bag(folder, **FEW, size=SIZE)


@pytest.mark.parametrize(("error", "seen"), [(OSError(28, "No space left"), UserError), (MemoryError(), MemoryError)])
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, error, seen):
    write = dataset._write_case

    def failing(folder, size, seed, case):
        if case.index == 1:
            raise error
        write(folder, size, seed, case)

    monkeypatch.setattr(dataset, "_write_case", failing)
    with pytest.raises(seen):
        make_screw_bag(tmp_path, **FEW, size=SIZE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("n_train", (0, 1001, True)),
        ("n_validation", (-1,)),
        ("n_test_good", (1.5,)),
        ("n_structural", ("3",)),
        ("n_logical", (None,)),
        ("size", (480, (480, 336, 3), (95, 336), (480, 2049), (480, float("nan")))),
        ("seed", (-1, 0.5)),
    ],
)
def test_bad_arguments_are_named(tmp_path, argument, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{argument}"):
            make_screw_bag(tmp_path / "new", **{**COUNTS, argument: value})
    assert not (tmp_path / "new").exists()
