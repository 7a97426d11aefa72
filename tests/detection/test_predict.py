import copy
import csv
import dataclasses
import errno
import json
import os
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import dskd_fast.detection.predict as predict_module
from dskd_fast import workers
from dskd_fast.detection import pictures
from dskd_fast.detection.overlay import overlay
from dskd_fast.detection.predict import Prediction, predict
from dskd_fast.errors import UserError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results"


def lines(out):
    content = (out / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in content.splitlines()]


@pytest.fixture
def predicted(tiny_detector, out):
    """Predicts, checks that both result files say what was returned, and returns it."""

    def run(*inputs, threshold=1.0, **options):
        predictions = predict(tiny_detector, inputs, out, threshold=threshold, **options)
        rows = [dataclasses.asdict(prediction) for prediction in predictions]
        assert lines(out) == rows
        with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        parts = dict.fromkeys(tiny_detector.parts)
        for row in rows:
            row |= {f"part_{name}": value for name, value in (parts | (row.pop("parts") or {})).items()}
        assert table == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
        for prediction in predictions:
            assert [prediction.error, prediction.skipped].count(None) == 1 + (prediction.score is not None)
            for file in (prediction.overlay, prediction.map):
                assert file is None or (out / file).is_file()
        return predictions

    return run


def test_each_image_gets_a_score_an_overlay_and_with_a_threshold_a_decision_whatever_the_batch_size(
    predicted, out, below, write_images, tmp_path
):
    paths, states = write_images(tmp_path / "images", 5), []
    with_threshold = predicted(tmp_path / "images", threshold=0.5)
    files = ["predictions.csv", "predictions.jsonl"]
    assert below(out) == ["overlays", *(f"overlays/00{i}.jpg" for i in range(5)), *files]
    without = predicted(*paths, threshold=None, batch_size=2, progress=lambda *state: states.append(state[1:]))
    assert states == [(2, 5), (4, 5), (5, 5)]
    for path, p, again in zip(paths, with_threshold, without, strict=True):
        assert (p.path, p.threshold, p.map) == (str(path), 0.5, None)
        assert p.decision == ("anomalous" if p.score > 0.5 else "normal")
        assert (again.threshold, again.decision, again.overlay) == (None, None, p.overlay)
        assert again.score == pytest.approx(p.score, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("max_held", [1, 2 * 64 * 80 * 3])
def test_large_images_are_held_and_drawn_one_at_a_time_and_smaller_ones_within_bounds(
    tiny_detector, predicted, write_images, tmp_path, monkeypatch, max_held
):
    paths = write_images(tmp_path / "images", 9)
    expected = {p.path: p.score for p in predicted(*paths)}
    alive, most = {}, {}
    lock = threading.Lock()

    def watch(owner, name):
        make = getattr(owner, name)

        def made(*arguments, **options):
            result = make(*arguments, **options)
            with lock:
                alive[name] = [other for other in alive.get(name, []) if other() is not None] + [weakref.ref(result)]
                most[name] = max(most.get(name, 0), len(alive[name]))
            return result

        monkeypatch.setattr(owner, name, made)

    monkeypatch.setattr(predict_module, "_MAX_HELD", max_held)
    monkeypatch.setattr(workers, "MAX_WAITING", max_held)
    watch(predict_module, "read_image")
    watch(type(tiny_detector), "localisation_map")
    assert {p.path: p.score for p in predicted(*paths, save_maps=True)} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    # Beside the first: two that are read, two in a batch, and one, too heavy to wait, that is drawn.
    assert most["read_image"] <= (1 if max_held == 1 else 5)
    assert most["localisation_map"] == 1


def test_names_keep_folders_unicode_spaces_and_dots(tiny_detector, out, write_images, tmp_path):
    names = ["北京/图 像.png", "a.b.c.png", "[red]x.png", "deep/er/größe.PNG", "'q\",;\n.png", "\udcff.png"]
    for name in names:
        target = tmp_path / "images" / name
        write_images(target.parent, 1)[0].rename(target)
    predictions = predict(tiny_detector, [tmp_path / "images"], out, threshold=None, save_maps=True)
    assert {p.path for p in predictions} == {str(tmp_path / "images" / name) for name in names}
    assert {p.overlay for p in predictions} == {"overlays/" + name[:-4] + ".jpg" for name in names}
    assert {p.map for p in predictions} == {"maps/" + name[:-4] + ".tiff" for name in names}
    # What is not Unicode is escaped.
    assert [row["path"] for row in lines(out)] == [p.path for p in predictions]
    assert "\\udcff.png" in (out / "predictions.csv").read_bytes().decode("utf-8")


def test_equal_names_get_numbers_on_file_systems_that_ignore_case_too(predicted, out, write_images, tmp_path):
    a, b = write_images(tmp_path / "one", 2), write_images(tmp_path / "two", 2, seed=1)
    Image.open(a[0]).save(tmp_path / "one" / "000.jpg", quality=95)
    others = [shutil.copy(a[0], tmp_path / name) for name in ("a.png", "A.png", "a-2.png")]
    predictions = predicted(tmp_path / "one", tmp_path / "two", *others, overlay_format="png")
    assert [p.path for p in predictions] == [str(path) for path in (tmp_path / "one" / "000.jpg", *a, *b, *others)]
    names = ["000", "000-2", "001", "000-3", "001-2", "a", "A-2", "a-2-2"]
    assert [p.overlay for p in predictions] == [f"overlays/{name}.png" for name in names]
    for p in predictions:
        drawn = np.asarray(Image.open(out / p.overlay))[:64, :80]
        assert (drawn == np.asarray(Image.open(p.path))).all()


def test_images_are_predicted_once_and_hidden_ones_not_at_all(predicted, write_images, tmp_path):
    images = tmp_path / "images"
    paths = write_images(images, 2)
    write_images(images / ".cache" / "visible", 1)
    shutil.copy(paths[0], images / ".000.png")
    (images / "notes.txt").write_text("no image")
    (linked,) = write_images(tmp_path / "elsewhere", 1)
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "round").symlink_to(images)
    found = predicted(images, paths[0], images, paths[1], paths[1])
    assert [p.path for p in found] == [*map(str, paths), str(images / "linked" / linked.name)]


@pytest.mark.parametrize("inside", ["results", "."])
@pytest.mark.parametrize("other", [False, True])
def test_results_of_earlier_calls_are_not_taken_for_images(tiny_detector, out, write_images, inside, other):
    folder = out.parent / "images"
    first = write_images(folder, 2)
    own = folder / inside
    predict(tiny_detector, [folder], own, threshold=None, save_maps=True)
    write_images(own / "later", 1)
    found = predict(tiny_detector, [folder, *first], out if other else own, threshold=None, save_maps=True)
    assert {p.path: p.skipped for p in found if p.skipped is not None} == {
        str(own / name): "2 image files (drawn by an earlier prediction)" for name in ("maps", "overlays")
    }
    assert {p.path for p in found if p.skipped is None} == {str(own / "later" / "000.png"), *map(str, first)}


def test_a_second_call_replaces_the_results_of_the_first(predicted, out, write_images, tmp_path, below):
    predicted(*write_images(tmp_path / "first", 3), overlay_format="png")
    (second,) = write_images(tmp_path / "second", 1, seed=3)
    only, left = predicted(second)
    assert (only.path, only.overlay) == (str(second), "overlays/000.jpg")
    # Other images' results are not deleted, but nobody shall take them for this call's.
    assert (left.path, left.skipped[:13]) == (str(out / "overlays"), "2 image files")
    assert below(out / "overlays") == ["000.jpg", "001.png", "002.png"]
    # Nor an earlier overlay of an image that is scored and not drawn.
    predicted(second, overlays="none")
    assert below(out / "overlays") == ["001.png", "002.png"]


def test_overlays_are_drawn_of_the_images_that_are_asked_for(predicted, out, write_images, dead_frames, tmp_path):
    images = tmp_path / "images"
    write_images(images, 3)
    Image.fromarray(next(iter(dead_frames.values()))[0]).save(images / "dead.png")
    threshold = sorted(p.score for p in predicted(images, overlays="none") if p.reason is None)[1]
    assert not (out / "overlays").exists()
    found = predicted(images, threshold=threshold, overlays="anomalous")
    assert sorted(p.decision for p in found) == ["anomalous", "normal", "normal", "suspect"]
    assert [p.overlay is not None for p in found] == [p.decision != "normal" for p in found]
    with pytest.raises(UserError, match="without a threshold no image is anomalous"):
        predicted(images, threshold=None, overlays="anomalous")
    with pytest.raises(ValueError, match="'gif' is none of jpg, png"):
        predicted(images, overlay_format="gif")


def test_a_decision_without_a_place_says_so_and_is_drawn_over_the_map_of_the_global_student(
    tiny_detector, predicted, out, write_images, tmp_path, monkeypatch
):
    (path,) = write_images(tmp_path, 1, size=(600, 64))
    scored = copy.deepcopy(tiny_detector.calibrated)
    monkeypatch.setattr(tiny_detector, "calibrated", scored)
    for name, whole in (("condensed", True), ("local", False)):
        scored.handicap = torch.tensor([1e3 if part == name else 0.0 for part in tiny_detector.parts])
        (prediction,) = predicted(path, save_maps=True, overlay_format="png")
        (found,) = tiny_detector.predict(path)
        assert (prediction.decided_by, found.decided_by, prediction.is_whole) == (name, name, whole)
        assert prediction.parts == pytest.approx(found.parts, rel=1e-4, abs=1e-4)
        caption = f"score {prediction.score:.2f}   threshold 1.00   anomalous ({name}"
        caption += ": the image as a whole)" if whole else ")"
        drawn = found.global_map if whole else found.map
        expected = overlay(np.asarray(Image.open(path)), drawn, caption, 0.0, 2.0)
        difference = np.asarray(Image.open(out / prediction.overlay)) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= 1
        np.testing.assert_allclose(tifffile.imread(out / prediction.map), found.map, rtol=1e-4, atol=1e-4)
    # By the paper's scoring no part decides.
    monkeypatch.setattr(tiny_detector, "calibrated", None)
    (prediction,) = predict(tiny_detector, [path], out, threshold=-1e9, save_maps=True)
    assert (prediction.decision, prediction.decided_by, prediction.is_whole) == ("anomalous", None, False)
    assert list(prediction.parts) == ["local", "global"]


def test_unreadable_images_are_reported_and_the_others_are_done(predicted, out, write_images, tmp_path):
    paths = write_images(tmp_path / "images", 7)
    alone = {p.path: p.score for p in predicted(*(paths[i] for i in (0, 1, 6)))}
    shutil.rmtree(out)
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    paths[4].write_text("no image")
    paths[5].unlink()
    paths[5].symlink_to("nowhere")
    predictions = predicted(tmp_path / "images")
    for p, reason in zip(predictions[2:6], ("empty", "damaged", "it is no PNG", "no such file"), strict=True):
        assert p == Prediction(p.path, error=p.error)
        assert reason in p.error
        assert "\n" not in p.error
    found = {p.path: p.score for p in predictions if p.error is None}
    assert found == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert len(list((out / "overlays").iterdir())) == 3
    shutil.rmtree(out)
    predicted(paths[4])
    assert not (out / "overlays").exists()


def test_an_input_without_images_stops_before_anything_is_written(tiny_detector, out, write_images, tmp_path):
    write_images(tmp_path / "images", 1)
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "part" / "test").mkdir(parents=True)
    write_images(tmp_path / "part" / "ground_truth", 1)
    for names, message in (
        (["images", "nowhere"], r"no image or folder .*nowhere"),
        (["empty"], "empty holds no images"),
        (["part"], r"nothing to score: .*ground_truth has 1 image file \(masks"),
    ):
        with pytest.raises(UserError, match=message):
            predict(tiny_detector, [tmp_path / name for name in names], out, threshold=None)
    assert not out.exists()


def test_an_error_in_a_thread_is_raised_and_the_others_are_written(
    tiny_detector, out, write_images, tmp_path, monkeypatch
):
    paths = write_images(tmp_path / "images", 3)

    def fail(image, *rest, **options):
        if (image == np.asarray(Image.open(paths[1]))).all():
            raise MemoryError("no room to draw")
        return overlay(image, *rest, **options)

    monkeypatch.setattr(pictures, "overlay", fail)
    with pytest.raises(MemoryError, match="no room to draw"):
        predict(tiny_detector, paths, out, threshold=1.0)
    assert None not in [row["score"] for row in lines(out)]
    failure = "its pictures could not be written: MemoryError: no room to draw"
    assert [row["error"] for row in lines(out)] == [None, failure, None]


@pytest.mark.parametrize("where", ["at the end", "for room"])
def test_an_interrupt_while_overlays_are_waited_for_loses_no_score(
    tiny_detector, out, write_images, tmp_path, monkeypatch, where
):
    paths = write_images(tmp_path / "images", 3)
    is_written = threading.Event()

    def draw(image, *rest, **options):
        if (image != np.asarray(Image.open(paths[0]))).any():
            assert is_written.wait(60)
        return overlay(image, *rest, **options)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def write(*arguments):
        write_results(*arguments)
        is_written.set()

    write_results = predict_module._write_results
    monkeypatch.setattr(pictures, "overlay", draw)
    monkeypatch.setattr(predict_module, "_write_results", write)
    owner, name = (predict_module, "wait") if where == "at the end" else (workers.Workers, "behind")
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict(tiny_detector, paths, out, threshold=1.0)
    assert None not in [row["score"] for row in lines(out)]
    assert [row["error"] for row in lines(out)[1:]] == [predict_module._NOT_DRAWN] * 2


def test_a_full_disk_while_overlays_are_drawn_loses_no_score_and_leaves_nothing_half_written(
    tiny_detector, predicted, out, write_images, tmp_path, monkeypatch, below
):
    """Of the first image an earlier overlay is there; the second is drawn beside those that fail."""
    paths = [write_images(tmp_path / str(width), 1, size=(width, 64))[0] for width in (80, 90, 81)]
    expected = [p.score for p in predicted(*paths, overlays="none")]
    predicted(paths[0])
    before, write = (out / "overlays" / "000.jpg").read_bytes(), Path.write_bytes

    def write_on_full_disk(path, content):
        write(path, content)
        if Image.open(path).width < 2 * 90:
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_on_full_disk)
    predict(tiny_detector, paths, out, threshold=1.0)
    found = lines(out)[:3]
    assert [row["score"] for row in found] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert [row["overlay"] for row in found] == [None, "overlays/000-2.jpg", None]
    assert ["No space left on device" in (row["error"] or "") for row in found] == [True, False, True]
    assert below(out / "overlays") == ["000-2.jpg", "000.jpg"]
    assert (out / "overlays" / "000.jpg").read_bytes() == before


@pytest.mark.parametrize("name", ["overlays", "maps"])
def test_a_folder_of_somebody_else_is_not_filled(tiny_detector, out, write_images, tmp_path, below, name):
    (out / name).mkdir(parents=True)
    mine = write_images(out / name, 1)[0]
    before = mine.read_bytes()
    with pytest.raises(UserError, match=f"{name} is there, and is not from an earlier prediction"):
        predict(tiny_detector, write_images(tmp_path / "images", 1), out, threshold=None)
    assert mine.read_bytes() == before
    assert below(out) == [name, f"{name}/{mine.name}"]
