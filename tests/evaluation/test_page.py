import base64
import csv
import hashlib
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.integrate import trapezoid

import dskd_fast.evaluation.page as page_module
from dskd_fast.cli import main
from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.evaluation.page import Path, render, write_report

VARIANTS = ("combined", "local", "global")
WITHOUT_MAP = tuple(name for name in PARTS if name not in VARIANTS)


class Page(html.parser.HTMLParser):
    """A page's elements as a browser sees them, the texts of style and script, and the data."""

    def __init__(self, text):
        super().__init__()
        self.text, self.elements = text, []
        self.feed(text)
        self.style, self.json, self.script = re.findall(r"<(?:style|script)[^>]*>(.*?)</", text, re.DOTALL)
        self.data = json.loads(self.json)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def category(nasty_names, dead_frames):
    """Some names run right to left or are not UTF-8; one frame is dead, and masks are missing."""
    root = nasty_names("\u202e\U0001f529.png", "\udcff.png").root
    Image.fromarray(dead_frames["black"][0]).save(root / "test" / "logical_anomalies" / "black.png")
    shutil.rmtree(root / "ground_truth" / "logical_anomalies")
    return open_category(root, None)


@pytest.fixture(scope="module")
def page(tiny_run, category, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    return Page(write_report([tiny_run], out, data_root=category.root, device="cpu").read_text(encoding="utf-8"))


@pytest.fixture
def data_of(tmp_path):
    """The data of the page that runs make: data_of(run, ...)."""

    def data(*runs, **settings):
        page = write_report(runs, tmp_path / "out", device="cpu", **settings)
        return Page(page.read_text(encoding="utf-8")).data

    return data


def test_figures_scores_and_decisions_are_those_of_evaluate(page, tiny_run, tiny_detector, category, tmp_path):
    threshold = tiny_detector.calibration.threshold.value
    settings = {"threshold": threshold, "batch_size": 4, "scores_file": tmp_path / "scores.csv"}
    figures = evaluate(tiny_detector, category, **settings)
    (run,) = page.data["runs"]
    assert [run[key] for key in ("name", "path", "full_colour")] == ["run", str(tiny_run), 2 * threshold]
    for key in ("category", "threshold", "n_images", "decisions", "suspects", "absent"):
        assert run[key] == figures[key]
    assert run["parts"] == list(tiny_detector.parts)
    with settings["scores_file"].open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    results = [image["runs"][0] | {"type": image["kind"]} for image in page.data["images"]]
    for key in ("type", "decision", "decided_by", "reason"):
        assert [row[key] for row in rows] == [result[key] or "" for result in results]
    assert "suspect" in [row["decision"] for row in rows]
    assert len(run["absent"]) == 1
    columns = "score", "local_score", "global_score", *(f"part_{name}" for name in WITHOUT_MAP)
    for variant, column in zip((*VARIANTS, *WITHOUT_MAP), columns, strict=True):
        part = run["variants"][variant]
        if variant in WITHOUT_MAP:
            assert part["auroc"] == figures["parts"][variant]
            shown = ("combined", True) if PARTS[variant].has_map else ("global", False)
            assert set(part["spro"].values()) == set(part["spro_curve"].values()) == {None}
        else:
            for measure in ("auroc", "spro"):
                assert part[measure] == figures.get(variant, figures)[measure]
            shown = (variant, True)
        assert (part["map"], part["has_place"]) == shown
        scores = np.array([result["scores"][variant] for result in results])
        assert scores.tolist() == [float(row[column]) for row in rows]
        edges, ends = part["histogram"]["edges"], [*scores, *([threshold] if variant == "combined" else [])]
        assert (edges[0], edges[-1]) == (min(ends), max(ends))
        for kind, n in run["n_images"].items():
            counts, _ = np.histogram(scores[[row["type"] == kind for row in rows]], edges)
            assert part["histogram"]["counts"][kind] == counts.tolist()
            assert counts.sum() == n


def test_the_drawn_curves_have_the_areas_of_the_figures(page):
    for part in page.data["runs"][0]["variants"].values():
        # With so few images no corner of a ROC is left out.
        for curves, areas, limit, error in (("roc", "auroc", 1, 1e-4), ("spro_curve", "spro", 0.05, 0.003)):
            for kind, curve in part[curves].items():
                if part[areas][kind] is None:
                    assert curve is None
                    continue
                x, y = curve
                assert (x[0], y[0], x[-1]) == (0, 0, limit)
                assert trapezoid(y, x) / limit == pytest.approx(part[areas][kind], abs=error)


def test_maps_are_grey_from_the_normal_mean_to_full_colour_and_of_limited_size(page, tiny_detector, category):
    images = ImageStore([item.path for item in category.test], 64)
    maps = tiny_detector.find(images.batch(range(len(images)))).maps
    for i, image in enumerate(page.data["images"]):
        assert list(image["runs"][0]["maps"]) == list(VARIANTS)
        for variant in VARIANTS:
            grey = Image.open(io.BytesIO(base64.b64decode(image["runs"][0]["maps"][variant])))
            assert (grey.format, grey.mode, grey.size) == ("PNG", "L", (64, 64))
            expected = 255 * np.clip(maps.of(variant)[i] / page.data["runs"][0]["full_colour"], 0, 1)
            np.testing.assert_allclose(np.asarray(grey), expected, atol=0.51)
    noise = np.random.default_rng(0).random((128, 128), np.float32).repeat(2, 0).repeat(2, 1)
    text = page_module._map_png(tiny_detector, noise, (0.0, 1.0))
    assert Image.open(io.BytesIO(base64.b64decode(text))).size == (128, 128)
    assert 18_000 < len(text) <= 23_000


def test_the_policy_lets_the_page_run_its_own_script_and_nothing_else(page):
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    for name in ("style", "script"):
        digest = hashlib.sha256(getattr(page, name).encode()).digest()
        rules[f"{name}-src"] = f"'sha256-{base64.b64encode(digest).decode()}'"
    assert dict(rule.strip().split(" ", 1) for rule in policy.split(";")) == rules


def test_no_string_leaves_the_data(page):
    assert {"good/\u202e\U0001f529.png", "good/\udcff.png"} <= {image["name"] for image in page.data["images"]}
    texts = ["</script><script>alert(1)</script>", "<!--<script>", "{{script}}{{style}}", "\u2028"]
    other = Page(render({"runs": texts}))
    assert other.data == {"runs": texts}
    for found in (page, other):
        assert [tag for tag, _ in found.elements] == [tag for tag, _ in Page(render({})).elements]
        assert "<" not in found.json
        assert found.json.isascii()
    with pytest.raises(ValueError, match="JSON compliant"):
        render({"score": float("nan")})


def test_runs_of_the_same_images_share_photographs_and_others_have_their_own_with_the_category_in_the_name(
    tiny_run, own_run, write_images, edit, tmp_path, data_of
):
    write_images(tmp_path / "part" / "train", 2)
    write_images(tmp_path / "part" / "test" / "good", 3)
    third = shutil.copytree(own_run, tmp_path / "runs" / "third")
    edit(third / "config.json", lambda c: c.update(category="part", data_root=str(tmp_path / "part")))
    edit(own_run / "config.json", lambda c: c["options"].update(scoring="paper"))
    stages = {}
    found = data_of(third, tiny_run, own_run, progress=lambda stage, *done: stages.update({stage: done}))
    runs = [(str(third), "third"), (str(tiny_run), "run"), (str(own_run), "own run")]
    assert [(run["path"], run["name"]) for run in found["runs"]] == runs
    assert [run["parts"] for run in found["runs"]] == [[*PARTS], [*PARTS], []]
    images = found["images"]
    names = [*(f"part/good/00{i}.png" for i in range(3)), "screw_bag/good/000.png"]
    assert [image["name"] for image in images[:4]] == names
    has_result = [[result is not None for result in image["runs"]] for image in images]
    assert has_result == [[True, False, False]] * 3 + [[False, True, True]] * 10
    for _, first, second in (image["runs"] for image in images[3:]):
        assert list(first["scores"])[3:] == list(WITHOUT_MAP)
        # By the paper's scoring there are no parts to list, and none that decides.
        assert (list(second["scores"]), second["decided_by"]) == (list(VARIANTS), None)
        assert first["scores"]["combined"] != second["scores"]["combined"]
        assert first["maps"] != second["maps"]
    for stage in ("reading images", "computing maps", "scoring combined maps", "scoring global maps", "drawing"):
        assert [stages[f"{name}: {stage}"] for name in ("third", "run", "own run")] == [(3, 3), (10, 10), (10, 10)]


def test_a_run_with_one_student_has_what_there_is(data_root, tiny_arguments, tmp_path, data_of):
    arguments = ["--data-root", str(data_root / "screw_bag"), *tiny_arguments, "--students", "local"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    found = data_of(tmp_path / "run")
    (run,) = found["runs"]
    assert run["recipe"].endswith("epochs: 1, the local student alone")
    assert run["variants"]["teacher-means"]["map"] == "combined"
    for result in (image["runs"][0] for image in found["images"]):
        parts = ["local", "local-whitened", "patches", "arrangement", "teacher-means"]
        assert list(result["scores"]) == list(run["variants"]) == ["combined", *parts]
        assert list(result["maps"]) == ["combined", "local"]


def test_an_older_page_stays_if_an_image_is_damaged_or_the_disk_full(tiny_run, own_data, tmp_path, monkeypatch, below):
    out, bad = tmp_path / "out", own_data / "test" / "good" / "001.png"
    out.mkdir()
    (out / "index.html").write_text("old")

    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report([tiny_run], out, data_root=own_data, device="cpu")
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"good/001\.png"):
        write_report([tiny_run], out, data_root=own_data, device="cpu")
    assert below(out) == ["index.html"]
    assert (out / "index.html").read_bytes() == b"old"
