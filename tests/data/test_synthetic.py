import json
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dskd_fast.data.synthetic import dataset, make_screw_bag
from dskd_fast.data.synthetic.anomalies import LOGICAL, STRUCTURAL, silhouette
from dskd_fast.data.synthetic.dataset import FOLDERS, Case, compose, defects_config, plan
from dskd_fast.data.synthetic.rendering import Canvas, render
from dskd_fast.data.synthetic.scene import BAG_HALF, LONG, SHORT, Bend, sample_scene
from dskd_fast.errors import UserError

SIZE = (150, 110)
COUNTS = {"n_train": 3, "n_validation": 2, "n_test_good": 1, "n_structural": 6, "n_logical": 2}
GOOD_PARTS = sorted([("Screw", LONG), ("Screw", SHORT)] + [("Nut", 0.0), ("Washer", 0.0)] * 2)
BAG_MARKS = {"contamination", "bag_tear", "bag_scratch", "foreign_fibre"}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def case_of(kind, index=0):
    return Case(FOLDERS[3] if kind in STRUCTURAL else FOLDERS[4], index, (kind,))


def named(kind):
    return kind.name


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    return make_screw_bag(tmp_path_factory.mktemp("synthetic") / "größe 1", **COUNTS, size=SIZE, seed=3)


def test_layout_is_that_of_loco(category):
    assert category.name == "screw_bag"
    assert set(contents(category)) == {
        "defects_config.json",
        "synthetic.json",
        *(f"train/good/00{i}.png" for i in range(3)),
        *(f"validation/good/00{i}.png" for i in range(2)),
        "test/good/000.png",
        *(f"test/structural_anomalies/00{i}.png" for i in range(6)),
        *(f"test/logical_anomalies/00{i}.png" for i in range(2)),
        *(f"ground_truth/structural_anomalies/00{i}/000.png" for i in range(6)),
        "ground_truth/structural_anomalies/005/001.png",
        *(f"ground_truth/logical_anomalies/00{i}/000.png" for i in range(2)),
    }
    assert [path.name for path in category.parent.iterdir()] == ["screw_bag"]


def test_images_are_rgb_and_masks_hold_zero_and_one_configured_value(category):
    config = json.loads((category / "defects_config.json").read_text(encoding="utf-8"))
    values = [entry["pixel_value"] for entry in config]
    assert len(set(values)) == len(values)
    for path in category.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == SIZE
            assert image.mode == ("L" if "ground_truth" in path.parts else "RGB")
            pixels = np.asarray(image)
        if "ground_truth" in path.parts:
            zero, value = np.unique(pixels)
            assert zero == 0
            assert value in values
        else:
            assert 40 < pixels.mean() < 200
            assert pixels.std() > 10


def test_masks_of_an_image_carry_the_values_of_its_planned_kinds(category):
    by_name = {entry["defect_name"]: entry["pixel_value"] for entry in defects_config(SIZE)}
    cases = [case for case in plan(tuple(COUNTS.values())) if case.kinds]
    assert len(cases) == 8
    for case in cases:
        found = [int(np.asarray(Image.open(category / mask)).max()) for mask in case.masks()]
        assert found == [by_name[kind.name] for kind in case.kinds]


def test_files_hold_what_compose_and_render_give(category):
    case = plan(tuple(COUNTS.values()))[-1]
    _, scene, (region,) = compose(case, 3)
    assert np.array_equal(np.asarray(Image.open(category / case.image)), render(scene, SIZE))
    assert np.array_equal(np.asarray(Image.open(category / case.masks()[0])) > 0, region(Canvas(SIZE)))


def test_config_has_relative_and_absolute_saturation_in_locos_form():
    config = defects_config((480, 336))
    assert [set(entry) for entry in config] == [
        {"defect_name", "pixel_value", "saturation_threshold", "relative_saturation"}
    ] * len(config)
    assert all(0 < entry["pixel_value"] <= 255 for entry in config)
    by_name = {entry["defect_name"]: entry for entry in config}
    for kind in STRUCTURAL:
        assert by_name[kind.name]["relative_saturation"] is True
        assert by_name[kind.name]["saturation_threshold"] == 1.0
    washer = math.pi * (25.0**2 - 12.0**2)
    nut = 2 * math.sqrt(3) * 21.5**2 - math.pi * 9.0**2
    for name, area in (("washer_extra", washer), ("washer_missing", washer), ("nut_extra", nut)):
        assert by_name[name]["relative_saturation"] is False
        assert by_name[name]["saturation_threshold"] == pytest.approx(area, rel=0.005)
        assert isinstance(by_name[name]["saturation_threshold"], int)
    halved = {e["defect_name"]: e["saturation_threshold"] for e in defects_config((240, 168))}
    assert halved["washer_extra"] == pytest.approx(washer / 4, rel=0.01)


def test_same_parameters_give_the_same_bytes_for_any_number_of_threads(category, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    single = make_screw_bag(tmp_path / "single", **COUNTS, size=SIZE, seed=3)
    assert contents(single) == contents(category)
    other = make_screw_bag(tmp_path / "other", **COUNTS, size=SIZE, seed=4)
    assert contents(other)["train/good/000.png"] != contents(category)["train/good/000.png"]


def test_images_of_one_category_all_differ(category):
    images = [data for name, data in contents(category).items() if name.startswith(("train", "valid", "test"))]
    assert len(set(images)) == len(images) == 14


def test_plan_spreads_the_kinds_evenly():
    cases = plan((1, 0, 0, 2 * len(STRUCTURAL), 2 * len(LOGICAL)))
    first = [case.kinds[0].name for case in cases if case.kinds]
    assert len(STRUCTURAL) >= 6
    assert len(LOGICAL) >= 6
    assert all(first.count(kind.name) == 2 for kind in STRUCTURAL + LOGICAL)
    for case in cases:
        assert len({kind.name for kind in case.kinds}) == len(case.kinds)


def test_good_scenes_hold_the_exact_parts_inside_the_bag_without_overlap():
    canvas = Canvas(SIZE)
    for seed in range(15):
        scene = sample_scene(np.random.default_rng(seed))
        assert scene.inventory() == GOOD_PARTS
        assert scene.marks == ()
        covers = [silhouette(part, scene.bag, canvas) for part in scene.parts]
        assert all(cover.max() > 0.9 for cover in covers)
        assert sum(covers).max() <= 1 + 1e-6
        u, v = scene.bag.to_inner(*canvas.grid())
        outside = (np.abs(u) > BAG_HALF[0]) | (np.abs(v) > BAG_HALF[1])
        assert sum(covers)[outside].max() == 0
        # The outline of the bag itself lies inside the image.
        assert outside[0].all()
        assert outside[-1].all()
        assert outside[:, 0].all()
        assert outside[:, -1].all()


@pytest.mark.parametrize("kind", LOGICAL, ids=named)
def test_logical_anomalies_change_the_parts_and_damage_none(kind):
    for index in range(3):
        good, scene, _ = compose(case_of(kind, index), 0)
        assert good.inventory() == GOOD_PARTS
        assert scene.inventory() != GOOD_PARTS
        assert scene.marks == ()
        for part in scene.parts:
            assert all(getattr(part, damage, None) is None for damage in ("bend", "rust", "chip", "gap"))
        assert sum(silhouette(part, scene.bag, Canvas(SIZE)) for part in scene.parts).max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nut_missing", {"Nut": -1}),
        ("washer_missing", {"Washer": -1}),
        ("screw_long_missing", {LONG: -1}),
        ("screw_short_missing", {SHORT: -1}),
        ("nut_extra", {"Nut": 1}),
        ("washer_extra", {"Washer": 1}),
        ("screw_short_extra", {SHORT: 1}),
        ("screws_both_long", {LONG: 1, SHORT: -1}),
        ("screws_both_short", {LONG: -1, SHORT: 1}),
    ],
)
def test_logical_anomalies_do_what_their_names_say(name, change):
    _, scene, _ = compose(case_of(next(kind for kind in LOGICAL if kind.name == name)), 0)
    expected = {"Nut": 2, "Washer": 2, LONG: 1, SHORT: 1}
    for key, step in change.items():
        expected[key] += step
    found = [length or part for part, length in scene.inventory()]
    assert {key: found.count(key) for key in expected} == expected
    assert len(found) == sum(expected.values())


@pytest.mark.parametrize("kind", STRUCTURAL, ids=named)
def test_structural_anomalies_keep_the_parts(kind):
    _, scene, _ = compose(case_of(kind), 0)
    assert scene.inventory() == GOOD_PARTS


@pytest.mark.parametrize("kind", STRUCTURAL, ids=named)
def test_structural_twin_differs_in_the_mask_and_only_around_it(kind):
    size = (240, 168)
    for index in range(2):
        good, scene, (region,) = compose(case_of(kind, index), 1)
        mask = region(Canvas(size))
        change = np.abs(render(scene, size).astype(int) - render(good, size)).max(axis=2)
        # Paint stops at its edge; a changed part also moves its shadow and the film on it (20 units).
        reach = 2 if kind.name in BAG_MARKS else 12
        assert change[~ndimage.binary_dilation(mask, iterations=reach, structure=np.ones((3, 3)))].max() == 0
        assert (change[mask] > 3).mean() > 0.8
        assert change[mask].mean() > 12


@pytest.mark.parametrize("kind", STRUCTURAL, ids=named)
def test_structural_defects_show_at_128_pixels(kind):
    good, scene, _ = compose(case_of(kind), 2)
    small = [
        np.asarray(Image.fromarray(render(state, (480, 336))).resize((128, 128), Image.Resampling.BILINEAR))
        for state in (good, scene)
    ]
    change = np.abs(small[0].astype(int) - small[1]).max(axis=2)
    assert (change > 15).sum() >= 8


@pytest.mark.parametrize("kind", [k for k in LOGICAL if k.name.endswith(("missing", "extra"))], ids=named)
def test_logical_twin_differs_only_around_the_mask(kind):
    size = (240, 168)
    good, scene, (region,) = compose(case_of(kind), 1)
    near = ndimage.binary_dilation(region(Canvas(size)), iterations=12, structure=np.ones((3, 3)))
    change = np.abs(render(scene, size).astype(int) - render(good, size)).max(axis=2)
    assert change[~near].max() == 0
    assert change[near].max() > 30


@pytest.mark.parametrize("kind", STRUCTURAL + LOGICAL, ids=named)
@pytest.mark.parametrize("size", [(96, 96), (300, 130)])
def test_masks_are_there_at_every_size_and_large_enough_to_saturate(kind, size):
    thresholds = {entry["defect_name"]: entry for entry in defects_config(size)}
    entry = thresholds[kind.name]
    for index in range(2):
        _, _, (region,) = compose(case_of(kind, index), 5)
        mask = region(Canvas(size))
        assert mask.shape == (size[1], size[0])
        assert mask.dtype == bool
        assert 0 < mask.sum() < 0.25 * mask.size
        if not entry["relative_saturation"]:
            # Equality up to the raster: a mask may be the silhouette of one part.
            assert mask.sum() >= 0.9 * entry["saturation_threshold"]


@pytest.mark.parametrize(
    ("name", "objects"),
    [
        ("washer_extra", 3),
        ("nut_extra", 3),
        ("screws_both_long", 2),
        ("screws_both_short", 2),
        ("screw_short_extra", 2),
        ("screw_medium", 1),
        ("screw_overlong", 1),
    ],
)
def test_surplus_masks_cover_all_alike_parts(name, objects):
    kind = next(kind for kind in LOGICAL if kind.name == name)
    _, scene, (region,) = compose(case_of(kind), 0)
    mask = region(Canvas((480, 336)))
    assert ndimage.label(mask, structure=np.ones((3, 3)))[1] == objects
    entry = next(entry for entry in defects_config((480, 336)) if entry["defect_name"] == name)
    if not entry["relative_saturation"]:
        assert mask.sum() == pytest.approx(objects * entry["saturation_threshold"], rel=0.03)
    # Metal is brighter than film, so the image must be brighter under the mask than beside it.
    grey = render(scene, (480, 336)).mean(axis=2)
    beside = ndimage.binary_dilation(mask, iterations=25) & ~ndimage.binary_dilation(mask, iterations=15)
    assert grey[mask].mean() > grey[beside].mean() + 25


def test_missing_masks_lie_where_the_good_twin_has_the_part():
    for kind in LOGICAL:
        if kind.name.endswith("missing"):
            good, scene, (region,) = compose(case_of(kind), 0)
            (gone,) = set(good.parts) - set(scene.parts)
            was = silhouette(gone, good.bag, Canvas(SIZE)) > 0.5
            mask = region(Canvas(SIZE))
            assert mask[was].all()
            for part in scene.parts:
                assert not (mask & (silhouette(part, scene.bag, Canvas(SIZE)) >= 0.5)).any()


def test_two_defects_of_one_image_lie_apart():
    doubles = [case for case in plan((1, 0, 0, 48, 0)) if len(case.kinds) == 2]
    assert len(doubles) == 8
    for case in doubles:
        _, _, (first, second) = compose(case, 0)
        assert not (first(Canvas((480, 336))) & second(Canvas((480, 336)))).any()


def test_scene_is_not_changed_by_rendering():
    scene = sample_scene(np.random.default_rng(0))
    assert np.array_equal(render(scene, SIZE), render(scene, SIZE))


@pytest.mark.parametrize("angle", [0.5, -0.5])
def test_bend_keeps_lengths_along_the_axis_and_straightens_back(angle):
    bend = Bend(start=-5.0, angle=angle, radius=30.0)
    along = np.linspace(-80, 80, 2001)
    x, y = np.array([bend.axis(a) for a in along]).T
    assert np.hypot(np.diff(x), np.diff(y)) == pytest.approx(0.08, rel=1e-3)
    assert math.atan2(y[-1] - y[-2], x[-1] - x[-2]) == pytest.approx(angle, abs=1e-6)
    back_x, back_y = bend.straighten(x, y)
    assert back_x == pytest.approx(along, abs=1e-6)
    assert back_y == pytest.approx(0, abs=1e-6)


def test_existing_folder_with_the_same_parameters_is_reused(tmp_path):
    few = {**COUNTS, "n_structural": 1, "n_logical": 1}
    made = make_screw_bag(tmp_path, **few, size=SIZE)
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    again = make_screw_bag(tmp_path, **{k: np.int64(v) for k, v in few.items()}, size=list(SIZE), seed=0)
    assert again == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    for change in ({"seed": 1}, {"size": (151, 110)}, {"n_train": 2}):
        with pytest.raises(UserError, match="other parameters"):
            make_screw_bag(tmp_path, **{**few, "size": SIZE, **change})
    (made / "train/good/001.png").unlink()
    with pytest.raises(UserError, match=r"lost its file train.good.001\.png"):
        make_screw_bag(tmp_path, **few, size=SIZE)


@pytest.mark.parametrize("manifest", [None, "{", "[]", "\udcff", "[" * 100_000])
def test_foreign_folder_is_refused_and_left_alone(tmp_path, manifest):
    target = tmp_path / "screw_bag"
    target.mkdir()
    (target / "photo.png").write_bytes(b"precious")
    if manifest is not None:
        (target / "synthetic.json").write_bytes(manifest.encode("utf-8", "surrogateescape"))
    before = contents(target)
    with pytest.raises(UserError, match="screw_bag exists already"):
        make_screw_bag(tmp_path, **COUNTS, size=SIZE)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["screw_bag"]


def test_file_or_dangling_link_in_the_way_is_refused(tmp_path):
    (tmp_path / "screw_bag").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        make_screw_bag(tmp_path, **COUNTS, size=SIZE)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        make_screw_bag(tmp_path / "file", **COUNTS, size=SIZE)


@pytest.mark.parametrize(("error", "seen"), [(OSError(28, "No space left"), UserError), (MemoryError(), MemoryError)])
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, error, seen):
    write = dataset._write_case

    def failing(folder, size, seed, case):
        if case.index == 2:
            raise error
        write(folder, size, seed, case)

    monkeypatch.setattr(dataset, "_write_case", failing)
    with pytest.raises(seen):
        make_screw_bag(tmp_path, **COUNTS, size=SIZE)
    assert os.listdir(tmp_path) == []


def test_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    few = {"n_train": 1, "n_validation": 0, "n_test_good": 0, "n_structural": 0, "n_logical": 0}
    first = make_screw_bag(tmp_path / "first", **few, size=SIZE)
    write = dataset._write_case

    def overtaken(folder, size, seed, case):
        write(folder, size, seed, case)
        shutil.copytree(first, tmp_path / "second" / "screw_bag")

    monkeypatch.setattr(dataset, "_write_case", overtaken)
    made = make_screw_bag(tmp_path / "second", **few, size=SIZE)
    assert contents(made) == contents(first)
    assert os.listdir(tmp_path / "second") == ["screw_bag"]


def test_folders_for_no_images_are_not_made(tmp_path):
    none = {"n_train": 1, "n_validation": 0, "n_test_good": 0, "n_structural": 0, "n_logical": 0}
    made = make_screw_bag(tmp_path, **none, size=SIZE)
    assert sorted(path.name for path in made.iterdir()) == ["defects_config.json", "synthetic.json", "train"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_train", 0),
        ("n_train", 1001),
        ("n_train", True),
        ("n_validation", -1),
        ("n_test_good", 1.5),
        ("n_structural", "3"),
        ("n_logical", None),
        ("size", 480),
        ("size", (480,)),
        ("size", (480, 336, 3)),
        ("size", (95, 336)),
        ("size", (480, 2049)),
        ("size", (480, float("nan"))),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_bad_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(UserError, match=rf"^{argument}"):
        make_screw_bag(tmp_path / "new", **{**COUNTS, argument: value})
    assert not (tmp_path / "new").exists()
