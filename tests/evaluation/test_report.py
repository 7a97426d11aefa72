import base64
import dataclasses
import hashlib
import html.parser
import io
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.integrate import trapezoid

import dskd_fast.evaluation.report as report_module
from dskd_fast.cli import main
from dskd_fast.data.images import ImageError, read_image
from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.overlay import colours
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.evaluation.report import render, write_report

KINDS = ("good", "structural", "logical")
VARIANTS = ("combined", "local", "global")
SVG_NAMESPACE = "http://www.w3.org/2000/svg"

# Markup, quotes, other scripts, an order that runs right to left, and a byte that is not UTF-8.
NASTY = [
    "\"><img src=x onerror=alert(1)>'ü漢.png",
    "<svg onload=alert(1)>&lt;.png",
    "\u202e\U0001f529.png",
    "\udcff.png",
]


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and the text of scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.inside = [], {}, None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.data = json.loads(self.texts["data"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside = dict(attributes).get("id", tag)

    def handle_endtag(self, _):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture(scope="module")
def category(data_root):
    return open_category(data_root, "screw_bag")


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    return Page(write_report([tiny_run], tmp_path_factory.mktemp("report") / "new" / "folder", device="cpu"))


@pytest.fixture
def own_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "runs" / "own")


@pytest.fixture
def own_data(data_root, tmp_path):
    return shutil.copytree(data_root, tmp_path / "data") / "screw_bag"


def image_in(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


# --------------------------------------------------------------------------------------------- figures and curves


def test_the_figures_are_those_of_evaluate(page, tiny_run, tiny_detector, category):
    threshold = tiny_detector.calibration.threshold.value
    figures = evaluate(tiny_detector, category, threshold=threshold, batch_size=4)
    (run,) = page.data["runs"]
    for variant in VARIANTS:
        expected = figures if variant == "combined" else figures[variant]
        for measure in ("auroc", "spro"):
            assert run["variants"][variant][measure] == expected[measure]
    for key in ("category", "threshold", "n_images", "decisions", "suspects", "absent"):
        assert run[key] == figures[key]
    assert (run["name"], run["path"]) == ("run", str(tiny_run))
    assert run["full_colour"] == 2 * threshold


def test_scores_and_decisions_of_each_image_are_those_of_evaluate(page, tiny_detector, category, tmp_path):
    threshold = tiny_detector.calibration.threshold.value
    evaluate(tiny_detector, category, threshold=threshold, batch_size=4, scores_file=tmp_path / "scores.csv")
    header, *rows = [line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()]
    assert len(rows) == len(page.data["images"]) == 10
    for values, image in zip(rows, page.data["images"], strict=True):
        row = dict(zip(header, values, strict=True))
        (result,) = image["runs"]
        assert (f"test/{image['name']}", image["kind"], result["decision"]) == (
            row["image"],
            row["type"],
            row["decision"],
        )
        for variant, column in zip(VARIANTS, ("score", "local_score", "global_score"), strict=True):
            assert result["scores"][variant] == float(row[column])


def test_dead_frames_are_suspect_with_the_reason(tiny_run, own_data, dead_frames, tmp_path):
    Image.fromarray(dead_frames["black"][0]).save(own_data / "test" / "logical_anomalies" / "black.png")
    found = Page(write_report([tiny_run], tmp_path / "out", data_root=own_data, device="cpu")).data
    assert found["runs"][0]["suspects"] == {"good": 0, "structural": 0, "logical": 1}
    results = {image["name"]: image["runs"][0] for image in found["images"]}
    black = results.pop("logical_anomalies/black.png")
    assert (black["decision"], black["reason"].split(" (")[0]) == ("suspect", "too dark and too little contrast")
    assert {(result["decision"] == "suspect", result["reason"]) for result in results.values()} == {(False, None)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_drawn_curves_have_the_areas_that_are_told(page, variant):
    part = page.data["runs"][0]["variants"][variant]
    for kind in ("structural", "logical"):
        x, y = part["roc"][kind]
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        # With so few images no corner is left out.
        assert trapezoid(y, x) == pytest.approx(part["auroc"][kind], abs=1e-4)
        x, y = part["spro_curve"][kind]
        assert (x[0], y[0], x[-1]) == (0, 0, 0.05)
        assert trapezoid(y, x) / 0.05 == pytest.approx(part["spro"][kind], abs=0.003)


@pytest.mark.parametrize("width", [1.0, 0.05])
@pytest.mark.parametrize("n", [2, 100, 20_000])
def test_what_is_left_out_of_a_curve_would_not_be_seen(n, width):
    rng = np.random.default_rng(n)
    x, y = (np.sort(np.append(rng.random(n) ** 3, [0, 1])) for _ in range(2))
    x *= width
    drawn = np.array(report_module._points((x, y), width))
    assert drawn.shape[1] <= min(n + 2, 2 * 2 * 401)
    assert drawn[:, [0, -1]].T.tolist() == [[0, 0], [width, 1]]
    assert (np.diff(drawn, axis=1) >= 0).all()
    distance = np.abs(np.interp(x, *drawn) - y)
    # A rising curve leaves a cell at the top or at the right: the drawn line is off by the cell in y, or in x.
    shifted = np.minimum(np.abs(np.interp(x + width / 400, *drawn) - y), np.abs(np.interp(x - width / 400, *drawn) - y))
    assert np.minimum(distance, shifted).max() < 1.1 / 400


def test_there_is_no_curve_to_thin_out_where_there_is_none():
    assert report_module._points(None, 1.0) is None


def test_the_histogram_counts_every_image_once(page):
    run = page.data["runs"][0]
    for variant in VARIANTS:
        histogram = run["variants"][variant]["histogram"]
        edges = histogram["edges"]
        assert edges == sorted(set(edges))
        for kind in KINDS:
            scores = [i["runs"][0]["scores"][variant] for i in page.data["images"] if i["kind"] == kind]
            # The last bin holds its upper edge, too.
            counts = [
                sum(low <= s < high or s == high == edges[-1] for s in scores)
                for low, high in itertools.pairwise(edges)
            ]
            assert histogram["counts"][kind] == counts
            assert sum(histogram["counts"][kind]) == run["n_images"][kind]
    edges = run["variants"]["combined"]["histogram"]["edges"]
    assert edges[0] <= run["threshold"] <= edges[-1]


@pytest.mark.parametrize(
    ("scores", "threshold", "logarithmic"),
    [([1.0, 19.9], None, False), ([1.0, 20.1], None, True), ([-1.0, 500.0], None, False), ([1.0, 2.0], 30.0, True)],
)
def test_scores_that_spread_widely_get_a_logarithmic_axis(scores, threshold, logarithmic):
    histogram = report_module._histogram({"good": np.array(scores), "logical": np.array([])}, threshold)
    edges = np.array(histogram["edges"])
    assert histogram["logarithmic"] is logarithmic
    assert np.ptp(np.diff(np.log(edges) if logarithmic else edges)) < 1e-9
    assert (edges[0], edges[-1]) == (scores[0], max(scores[1], threshold or scores[1]))
    assert [sum(histogram["counts"][kind]) for kind in ("good", "logical")] == [2, 0]


def test_equal_scores_have_a_histogram():
    histogram = report_module._histogram({"good": np.array([3.0, 3.0])}, 3.0)
    assert (histogram["edges"][0], histogram["edges"][-1]) == (2.5, 3.5)
    assert sum(histogram["counts"]["good"]) == 2


# -------------------------------------------------------------------------------------------------------- images


def test_photographs_are_jpegs_of_limited_size_with_their_own_aspect(page, category, tmp_path, write_images):
    for image, item in zip(page.data["images"], category.test, strict=True):
        photo = image_in(image["photo"])
        assert photo.format == "JPEG"
        assert photo.size == (image["width"], image["height"]) == (120, 96)
        assert np.abs(np.asarray(photo).astype(int) - read_image(item.path)).mean() < 5
    (large,) = write_images(tmp_path, 1, size=(1000, 500))
    shrunk = report_module._photograph(dataclasses.replace(category.test[0], path=large))
    assert image_in(shrunk["photo"]).size == (shrunk["width"], shrunk["height"]) == (360, 180)


def test_noise_takes_no_more_room_than_is_told(category, tiny_detector, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    noise = report_module._photograph(dataclasses.replace(category.test[0], path=tmp_path / "noise.png"))
    assert 20_000 < len(noise["photo"]) <= 32_000
    grey = report_module._map_png(tiny_detector, rng.random((128, 128), np.float32), 1.0)
    assert 20_000 < len(grey) <= 23_000


def test_maps_are_grey_from_the_normal_mean_to_full_colour(page, tiny_detector, category):
    images = ImageStore([item.path for item in category.test], 64)
    maps = tiny_detector.maps(images.batch(range(len(images))))
    high = page.data["runs"][0]["full_colour"]
    for i, image in enumerate(page.data["images"]):
        for variant in VARIANTS:
            grey = image_in(image["runs"][0]["maps"][variant])
            assert (grey.format, grey.mode, grey.size) == ("PNG", "L", (64, 64))
            expected = 255 * np.clip(maps.of(variant)[i] / high, 0, 1)
            np.testing.assert_allclose(np.asarray(grey), expected, atol=0.51)


def test_large_maps_are_made_smaller_without_losing_their_level(tiny_detector):
    grey = image_in(report_module._map_png(tiny_detector, np.full((256, 256), 3, np.float32), 10.0))
    assert grey.size == (128, 128)
    assert set(np.asarray(grey).ravel().tolist()) == {round(0.3 * 255)}


def test_the_colours_are_those_of_the_overlays(page):
    tables = page.data["colours"]
    strength = np.linspace(0, 1, 1001)
    rgb, opacity = colours(strength)
    at = np.linspace(0, 1, len(tables["red"]))
    for i, name in enumerate(("red", "green", "blue")):
        np.testing.assert_allclose(255 * np.interp(strength, at, tables[name]), rgb[:, i], atol=0.05)
    np.testing.assert_allclose(np.interp(strength, at, tables["opacity"]), opacity, atol=1e-4)


# --------------------------------------------------------------------------- one file, no network, no foreign markup


def test_the_page_needs_nothing_else(page):
    addresses = re.findall(r"[a-z]+://[^\s\"'<>)]*", page.text)
    assert set(addresses) == {SVG_NAMESPACE}
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\((?!#)", page.texts["style"])


def test_the_policy_lets_the_page_run_its_own_script_and_nothing_else(page):
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = {
        name: f"'sha256-{base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()}'"
        for name in ("style", "script")
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_script_makes_no_markup_of_text(page):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", page.text)


def test_names_in_the_data_are_data(tiny_run, own_data, page, tmp_path):
    good = sorted((own_data / "test" / "good").iterdir())
    for path, name in zip(good, NASTY, strict=True):
        path.rename(path.with_name(name))
    found = Page(write_report([tiny_run], tmp_path / "out", data_root=own_data, device="cpu"))
    assert {f"good/{name}" for name in NASTY} <= {image["name"] for image in found.data["images"]}
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in page.elements]
    assert "<" not in found.texts["data"]
    assert found.texts["data"].isascii()


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!--<script>", "{{script}}{{style}}", "\u2028"]
)
def test_no_string_leaves_the_data(text, tmp_path):
    (tmp_path / "page.html").write_text(render({"runs": text}), encoding="utf-8")
    found = Page(tmp_path / "page.html")
    assert found.data == {"runs": text}
    assert [tag for tag, _ in found.elements].count("script") == 2


def test_numbers_that_json_does_not_have_are_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        render({"score": float("nan")})


# ------------------------------------------------------------------------------------------------- several runs


def test_runs_of_the_same_images_share_their_photographs(tiny_run, lite_run, tmp_path):
    found = Page(write_report([tiny_run, lite_run], tmp_path, device="cpu")).data
    assert [run["path"] for run in found["runs"]] == [str(tiny_run), str(lite_run)]
    assert len(found["images"]) == 10
    assert len({run["name"] for run in found["runs"]}) == 2
    for image in found["images"]:
        first, second = image["runs"]
        assert first["scores"] != second["scores"]
        assert first["maps"] != second["maps"]


def test_runs_of_other_images_have_their_own_with_the_category_in_the_name(tiny_run, own_run, write_images, tmp_path):
    write_images(tmp_path / "part" / "train", 2)
    write_images(tmp_path / "part" / "test" / "good", 3)
    config = json.loads((own_run / "config.json").read_text())
    config |= {"category": "part", "data_root": str(tmp_path / "part")}
    (own_run / "config.json").write_text(json.dumps(config))
    found = Page(write_report([own_run, tiny_run], tmp_path / "out", device="cpu")).data
    assert [image["name"] for image in found["images"][:4]] == [
        *(f"part/good/00{i}.png" for i in range(3)),
        "screw_bag/good/000.png",
    ]
    assert [[result is None for result in image["runs"]] for image in found["images"]] == [
        *[[False, True]] * 3,
        *[[True, False]] * 10,
    ]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/run"], ["run"]),
        (["/a/run", "/b/other"], ["run", "other"]),
        (["/a/run", "/b/run", "/b/other"], ["a/run", "b/run", "other"]),
        (["/a/x/run", "/b/x/run"], ["a/x/run", "b/x/run"]),
        (["/run", "/b/run"], ["/run", "b/run"]),
    ],
)
def test_names_of_runs_are_as_long_as_tells_them_apart(folders, names):
    assert report_module._names([report_module.Path(folder) for folder in folders]) == names


def test_a_run_that_is_named_twice_counts_once(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_run.parent)
    (tmp_path / "link").symlink_to(tiny_run)
    given = [tiny_run, report_module.Path("run"), report_module.Path("run/../run"), tmp_path / "link"]
    (run,) = Page(write_report(given, tmp_path / "out", device="cpu")).data["runs"]
    assert run["name"] == "run"


# --------------------------------------------------------------------------------------------- what there is not


def test_without_a_threshold_there_are_no_decisions_unless_one_is_given(own_run, tmp_path):
    calibration = json.loads((own_run / "calibration.json").read_text())
    (own_run / "calibration.json").write_text(json.dumps(calibration | {"threshold": None}))
    found = Page(write_report([own_run], tmp_path / "out", device="cpu")).data
    assert (found["runs"][0]["threshold"], found["runs"][0]["decisions"]) == (None, None)
    assert {image["runs"][0]["decision"] for image in found["images"]} == {None}

    found = Page(write_report([own_run], tmp_path / "out", threshold=-1e9, device="cpu")).data
    assert found["runs"][0]["decisions"] == {"good": 4, "structural": 3, "logical": 3}
    assert {image["runs"][0]["decision"] for image in found["images"]} == {"anomalous"}


def test_what_cannot_be_computed_is_absent_with_a_reason(tiny_run, own_data, tmp_path):
    shutil.rmtree(own_data / "ground_truth" / "logical_anomalies")
    shutil.rmtree(own_data / "test" / "structural_anomalies")
    (run,) = Page(write_report([tiny_run], tmp_path / "out", data_root=own_data, device="cpu")).data["runs"]
    for part in run["variants"].values():
        assert part["roc"]["structural"] is None
        assert part["roc"]["logical"] is not None
        assert part["spro_curve"] == {"structural": None, "logical": None}
        assert part["auroc"]["mean"] is None
    assert [next(kind for kind in ("structural", "logical") if kind in reason) for reason in run["absent"]] == [
        "structural",
        "logical",
        "structural",  # whose masks are left over
    ]


def test_a_run_with_one_student_has_what_there_is(data_root, tiny_arguments, tmp_path):
    arguments = ["--data-root", str(data_root / "screw_bag"), *tiny_arguments, "--students", "local"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    found = Page(write_report([tmp_path / "run"], tmp_path / "out", device="cpu")).data
    (run,) = found["runs"]
    assert run["recipe"].endswith("epochs: 1, the local student alone")
    assert list(run["variants"]) == ["combined", "local"]
    for image in found["images"]:
        (result,) = image["runs"]
        assert list(result["scores"]) == list(result["maps"]) == ["combined", "local"]
        assert result["scores"]["combined"] == result["scores"]["local"]
        assert result["maps"]["combined"] == result["maps"]["local"]


# ----------------------------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def no_scoring(monkeypatch):
    monkeypatch.setattr(report_module, "load_run", lambda *_: pytest.fail("began to score"))


def test_a_run_without_test_images_is_an_error_before_any_scoring(tiny_run, own_data, own_run, tmp_path, no_scoring):
    shutil.rmtree(own_data / "test")
    config = json.loads((own_run / "config.json").read_text())
    (own_run / "config.json").write_text(json.dumps(config | {"data_root": str(own_data)}))
    with pytest.raises(UserError, match=r"runs/own, has no test images: a report needs a folder test"):
        write_report([tiny_run, own_run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_known_before_any_scoring(tiny_run, tmp_path, no_scoring, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"):
            write_report([tiny_run], out)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="choose a writable place"):
        write_report([tiny_run], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damaged_images_are_named_and_an_older_page_stays(tiny_run, own_data, tmp_path):
    (tmp_path / "index.html").write_text("old")
    bad = own_data / "test" / "good" / "001.png"
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"good/001\.png"):
        write_report([tiny_run], tmp_path, data_root=own_data, device="cpu")
    assert (tmp_path / "index.html").read_text() == "old"


def test_a_disk_that_fills_up_keeps_the_older_page(tiny_run, tmp_path, monkeypatch, below):
    (tmp_path / "index.html").write_text("old")

    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report([tiny_run], tmp_path, device="cpu")
    assert below(tmp_path) == ["index.html"]
    assert (tmp_path / "index.html").read_bytes() == b"old"


def test_progress_names_the_run_where_there_are_several(tiny_run, own_run, tmp_path):
    stages = {}
    write_report(
        [tiny_run, own_run],
        tmp_path / "out",
        device="cpu",
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
    )
    for name in ("run", "own"):
        for stage in ("reading images", "computing maps", "scoring combined maps", "scoring global maps", "drawing"):
            assert stages[f"{name}: {stage}"][-1] == (10, 10)
