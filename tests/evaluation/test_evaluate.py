import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.metrics import roc_auc_score

from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import open_category
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import decide, evaluate
from dskd_fast.metrics.maps import ScoredMap, score_maps

KINDS = ("good", "structural", "logical")


@pytest.fixture(scope="module")
def evaluated(tiny_detector, category, tmp_path_factory):
    """The figures, the rows of scores.csv, and the folder with the maps."""
    maps, scores = (tmp_path_factory.mktemp("evaluated") / name for name in ("maps", "scores.csv"))
    threshold = tiny_detector.calibration.threshold.value
    figures = evaluate(tiny_detector, category, threshold=threshold, batch_size=4, save_maps=maps, scores_file=scores)
    return figures, read_rows(scores), maps


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name, *kinds):
    return np.array([float(row[name]) for row in rows if row["type"] in kinds])


def test_of_sound_data_nothing_is_absent(evaluated):
    figures, _, _ = evaluated
    assert (figures["category"], figures["scoring"]) == ("screw_bag", "calibrated")
    assert figures["n_images"] == {"good": 4, "structural": 3, "logical": 3}
    assert figures["suspects"] == {"good": 0, "structural": 0, "logical": 0}
    assert figures["absent"] == figures["warnings"] == figures["bad_masks"] == figures["unused"] == []
    for part in (figures["local"], figures["global"]):
        assert part["spro"] == part["spro_at"]["0.05"]
        assert None not in part["spro"].values()
    json.dumps(figures, allow_nan=False)


def area(rows, name, kind):
    of_kinds = [row for row in rows if row["type"] in ("good", kind)]
    return roc_auc_score([row["type"] == kind for row in of_kinds], [float(row[name]) for row in of_kinds])


def test_scores_parts_and_what_decides_are_those_of_predict(evaluated, category, tiny_detector):
    _, rows, _ = evaluated
    assert [row["image"] for row in rows] == [item.path.relative_to(category.root).as_posix() for item in category.test]
    assert list(rows[0])[8:] == ["decided_by", *(f"part_{name}" for name in tiny_detector.parts)]
    found = tiny_detector.predict([item.path for item in category.test], batch_size=4)
    for row, one in zip(rows, found, strict=True):
        assert float(row["score"]) == pytest.approx(one.score, rel=1e-6, abs=1e-6)
        parts = {name: float(row[f"part_{name}"]) for name in tiny_detector.parts}
        assert parts == pytest.approx(one.parts, rel=1e-6, abs=1e-6)
        assert row["decided_by"] == one.decided_by


def test_the_areas_are_those_that_sklearn_finds_in_the_scores_file(evaluated, category, tiny_detector):
    figures, rows, _ = evaluated
    found = {"score": figures["auroc"]} | {f"{name}_score": figures[name]["auroc"] for name in ("local", "global")}
    assert tuple(figures["parts"]) == tiny_detector.parts
    for name, areas in (found | {f"part_{name}": areas for name, areas in figures["parts"].items()}).items():
        expected = [area(rows, name, kind) for kind in KINDS[1:]]
        assert list(areas.values()) == pytest.approx([*expected, np.mean(expected)], rel=1e-12)
    assert figures["local"] != figures["global"]


def test_decisions_are_scores_above_the_threshold_and_each_part_counts_those_that_it_made(evaluated, tiny_detector):
    figures, rows, _ = evaluated
    assert {float(row["threshold"]) for row in rows} == {figures["threshold"]}
    assert [row["decision"] for row in rows] == [decide(float(row["score"]), figures["threshold"]) for row in rows]
    for kind in KINDS:
        of_kind = [row["decided_by"] for row in rows if (row["type"], row["decision"]) == (kind, "anomalous")]
        assert figures["decisions"][kind] == len(of_kind)
        assert figures["decided_by"][kind] == {name: of_kind.count(name) for name in tiny_detector.parts}


def figures_of(maps, rows, category, score="score"):
    scored = [
        ScoredMap(item.key, item.kind, found, float(row[score]), category.defects(item))
        for item, found, row in zip(category.test, maps, rows, strict=True)
    ]
    return score_maps(scored)


def test_maps_lie_in_the_evaluators_layout_at_native_size_and_give_the_figures(evaluated, category, below):
    figures, rows, folder = evaluated
    maps = [tifffile.imread(folder / "screw_bag" / f"{item.key}.tiff") for item in category.test]
    assert {(found.shape, found.dtype) for found in maps} == {((96, 120), np.dtype(np.float32))}
    assert sum(name.endswith(".tiff") for name in below(folder)) == len(maps)
    assert figures.items() >= figures_of(maps, rows, category).items()


@pytest.fixture
def papers(tiny_detector):
    """The detector with the paper's scoring."""
    return dataclasses.replace(tiny_detector, calibrated=None)


def test_the_papers_scoring_has_the_students_for_parts_and_none_decides(papers, category, tmp_path):
    figures = evaluate(papers, category, threshold=0.0, batch_size=4, scores_file=tmp_path / "scores.csv")
    assert (figures["scoring"], figures["decided_by"]) == ("paper", None)
    assert figures["parts"] == {name: figures[name]["auroc"] for name in ("local", "global")}
    found = papers.predict([item.path for item in category.test])
    for row, one in zip(read_rows(tmp_path / "scores.csv"), found, strict=True):
        assert float(row["score"]) == pytest.approx(one.score, rel=1e-4, abs=1e-4)
        assert row["decided_by"] == ""
        assert [row["part_local"], row["part_global"]] == [row["local_score"], row["global_score"]]


@pytest.mark.parametrize("scoring", ["calibrated", "paper"])
def test_the_maps_of_each_student_are_scored_in_their_own_right(tiny_detector, papers, category, tmp_path, scoring):
    detector, scores = tiny_detector if scoring == "calibrated" else papers, tmp_path / "scores.csv"
    figures = evaluate(detector, category, threshold=None, batch_size=4, scores_file=scores)
    found = detector.predict([item.path for item in category.test], batch_size=4)
    for student in ("local", "global"):
        maps = [getattr(one, f"{student}_map") for one in found]
        expected = figures_of(maps, read_rows(scores), category, f"{student}_score")
        assert figures[student].items() >= expected.items()


def test_the_batch_size_does_not_matter_and_without_a_threshold_there_are_no_decisions(
    evaluated, tiny_detector, category, tmp_path
):
    _, rows, _ = evaluated
    stages = {}

    def progress(stage, *done):
        stages.setdefault(stage, []).append(done)

    scores = tmp_path / "scores.csv"
    figures = evaluate(tiny_detector, category, threshold=None, batch_size=3, scores_file=scores, progress=progress)
    found = read_rows(scores)
    np.testing.assert_allclose(column(found, "score", *KINDS), column(rows, "score", *KINDS), rtol=1e-4, atol=1e-4)
    assert figures["threshold"] is figures["decisions"] is figures["decided_by"] is None
    assert {(row["threshold"], row["decision"]) for row in found} == {("", "")}
    assert stages["computing maps"] == [(3, 10), (6, 10), (9, 10), (10, 10)]
    for stage in ("reading images", *(f"scoring {variant} maps" for variant in ("combined", "local", "global"))):
        assert stages[stage] == [(i, 10) for i in range(1, 11)]


def test_bad_masks_leave_their_kind_without_spro_and_hide_nothing_else(tiny_detector, own_data, evaluated):
    bad = [own_data / "ground_truth" / "logical_anomalies" / name / "000.png" for name in ("000", "002")]
    bad[0].write_bytes(bad[0].read_bytes()[:40])
    Image.new("L", (120, 96)).save(bad[1])
    (own_data / "train" / "good" / "a.gif").touch()
    figures = evaluate(tiny_detector, open_category(own_data, None), threshold=None, batch_size=4)
    expected, _, _ = evaluated
    for found, wanted in ((figures, expected), *((figures[name], expected[name]) for name in ("local", "global"))):
        assert found["auroc"] == wanted["auroc"]
    for limit, values in figures["spro_at"].items():
        assert values == {"structural": expected["spro_at"][limit]["structural"], "logical": None, "mean": None}
    for path, sentence in zip(bad, figures["bad_masks"], strict=True):
        assert str(path) in sentence
    (absent,) = figures["absent"]
    assert "no sPRO of logical anomalies: masks of category screw_bag cannot be used (2 such" in absent
    assert figures["unused"] == [{"files": "formats that are not read", "n_files": 1, "first": ["train/good/a.gif"]}]


def test_test_images_that_are_trained_on_are_warned_of(tiny_detector, own_data):
    shutil.copy(own_data / "train" / "good" / "003.png", own_data / "test" / "good" / "001.png")
    shutil.copy(own_data / "validation" / "good" / "000.png", own_data / "test" / "logical_anomalies" / "000.png")
    (warning,) = evaluate(tiny_detector, open_category(own_data, None), threshold=None)["warnings"]
    assert "among the 10 test images: 2, such as test/good/001.png" in warning


@pytest.mark.parametrize(
    ("removed", "absent"), [("good", {"structural", "logical", "mean"}), ("logical_anomalies", {"logical", "mean"})]
)
def test_a_kind_without_images_has_no_figures_and_a_reason(tiny_detector, own_data, removed, absent):
    shutil.rmtree(own_data / "test" / removed)
    figures = evaluate(tiny_detector, open_category(own_data, None), threshold=0.0)
    for areas in (figures["auroc"], *figures["parts"].values()):
        assert {kind for kind, value in areas.items() if value is None} == absent
    kind = removed.removesuffix("_anomalies")
    assert figures["n_images"][kind] == figures["decisions"][kind] == 0
    assert any(kind in reason for reason in figures["absent"])
    if removed == "good":
        # Pixels outside the defects are negative on anomalous images, too.
        assert all(value is not None for value in figures["spro"].values())


def test_dead_frames_are_counted_and_scored_like_all_others(tiny_detector, own_data, evaluated, dead_frames, tmp_path):
    before, expected, _ = evaluated
    Image.fromarray(dead_frames["black"][0]).save(own_data / "test" / "good" / "black.png")
    scores, category = tmp_path / "scores.csv", open_category(own_data, None)
    after = evaluate(tiny_detector, category, threshold=before["threshold"], scores_file=scores)
    assert after["suspects"] == {"good": 1, "structural": 0, "logical": 0}
    assert after["decisions"] == before["decisions"]
    rows = read_rows(scores)
    assert after["auroc"]["structural"] == pytest.approx(area(rows, "score", "structural"), rel=1e-12)
    black = rows.pop([row["image"] for row in rows].index("test/good/black.png"))
    assert black["decision"] == "suspect"
    assert black["reason"].startswith("too dark and too little contrast (brightness 0.0")
    assert [(row["decision"], row["reason"]) for row in rows] == [(row["decision"], "") for row in expected]


def test_all_unreadable_test_images_are_named_and_nothing_is_written(tiny_detector, own_data, tmp_path):
    bad = [own_data / "test" / "good" / "001.png", own_data / "test" / "logical_anomalies" / "000.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:500])
    places = {"save_maps": tmp_path / "maps", "scores_file": tmp_path / "scores.csv"}
    with pytest.raises(ImageError) as caught:
        evaluate(tiny_detector, open_category(own_data, None), threshold=None, **places)
    assert sorted(path for path, _ in caught.value.failures) == bad
    assert not any(place.exists() for place in places.values())


def test_maps_never_replace_the_data_sets_own_images(tiny_detector, own_data, below):
    """Their layout is the data set's."""
    category, before = open_category(own_data, "screw_bag"), below(own_data)
    (own_data.parent / "link").symlink_to(own_data)
    for folder in (own_data, own_data.parent / "link", own_data / "test"):
        with pytest.raises(UserError, match="among the data set's own images"):
            evaluate(tiny_detector, category, threshold=None, save_maps=folder)
    assert below(own_data) == before
