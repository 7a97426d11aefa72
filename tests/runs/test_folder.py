import dataclasses
import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError
from dskd_fast.files import checksum_of, load_tensors, save_tensors
from dskd_fast.models.teacher import Teacher
from dskd_fast.runs.folder import begin_run, claimed, load_run, read_config, save_run
from dskd_fast.runs.options import ADDED_OPTIONS
from dskd_fast.training.train import train


def test_a_folder_is_made_and_locked_for_a_training_and_may_be_an_empty_one_behind_a_link(tmp_path, below):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for folder in (tmp_path / "deep" / "run", tmp_path / "link"):
        with claimed(folder, is_new=True):
            (folder / "config.json").write_text("a")
            assert below(folder) == [".dskd_fast.lock", "config.json"]
    assert (tmp_path / "link").is_symlink()
    assert below(tmp_path) == ["deep", "deep/run", "deep/run/config.json", "link", "real", "real/config.json"]


@pytest.mark.parametrize(
    ("is_new", "names", "left"),
    [
        (True, ["config.json"], []),
        (True, ["checkpoint.safetensors"], ["checkpoint.safetensors"]),
        (True, ["calibration.json", "config.json"], ["calibration.json", "config.json"]),
        (False, ["config.json"], ["config.json"]),
    ],
)
@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_after_an_error_a_state_or_a_finished_run_is_left_or_nothing(
    tmp_path, below, is_new, names, left, existed, error
):
    run = tmp_path / "run"
    if existed or not is_new:
        run.mkdir()

    def fail_inside():
        with claimed(run, is_new=is_new):
            for name in names:
                (run / name).touch()
            raise error("x")

    with pytest.raises(error):
        fail_inside()
    assert below(tmp_path) == ["run"] * (existed or left != []) + [f"run/{name}" for name in left]


def test_what_is_there_already_is_not_replaced_and_the_way_out_is_named(tmp_path, below):
    for name in (".7.csv", ".lock", "notes.txt", "begun/config.json", "done/config.json", "done/calibration.json"):
        (tmp_path / "full" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "full" / name).touch()
    (tmp_path / "dead").symlink_to("nowhere")
    before = below(tmp_path)
    for name, message in {
        "full": "full already exists: choose another name, or move it away$",
        "full/notes.txt": "txt already exists: .* move it away$",
        "dead": "dead already exists",
        "full/begun": "move it away, or go on with it by --resume .*begun$",
        "full/done": "move it away$",
        "full/notes.txt/run": "choose a writable place",
    }.items():
        with pytest.raises(UserError, match=message), claimed(tmp_path / name, is_new=True):
            pytest.fail("too late")
    assert below(tmp_path) == before


@pytest.mark.parametrize("is_new", [False, True])
def test_a_second_process_is_refused(tmp_path, fork, is_new):
    run = tmp_path / "run"

    def second():
        message = f"^another process is training in {run}: wait"
        with pytest.raises(UserError, match=message), claimed(run, is_new=is_new):
            pass

    with claimed(run, is_new=True):
        (run / "config.json").touch()
        assert fork(second)() == 0
        assert (run / "config.json").exists()


def test_the_lock_of_a_killed_process_does_not_hold(tmp_path, fork, below):
    run = tmp_path / "run"

    def killed():
        with claimed(run, is_new=True):
            (run / "config.json").touch()
            (run / ".123.safetensors").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(killed)() == -signal.SIGKILL
    assert below(run) == [".123.safetensors", ".dskd_fast.lock", "config.json"]
    with claimed(run, is_new=False):
        assert below(run) == [".dskd_fast.lock", "config.json"]  # what was half written is swept up


def test_what_is_loaded_is_what_was_saved(data_root, tiny_options, tmp_path, below):
    category, run = open_category(data_root, "screw_bag"), tmp_path / "run"
    options = tiny_options(sigma=1.25, align_corners=True, gccb=None)
    detector, history = train(category, options)
    begin_run(run, options, category, 0.1)
    (run / "checkpoint.safetensors").touch()
    save_run(run, detector, options, history)
    names = ["calibration.json", "config.json", "history.json", "scores.safetensors", "weights.safetensors"]
    assert below(run) == names

    loaded, loaded_options, config = load_run(run, "cpu")
    assert (loaded_options, loaded.calibration, loaded.scoring) == (options, detector.calibration, detector.scoring)
    assert config == read_config(run)
    assert json.loads((run / "history.json").read_text()) == [dataclasses.asdict(e) for e in history]
    assert not any(part.training for part in loaded.model.modules())
    state, saved = detector.model.state_dict(), safetensors.torch.load_file(run / "weights.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    assert loaded.model.is_folded
    with pytest.raises(ValueError, match="folded"):
        save_run(run, loaded, options, history)
    images = ImageStore(category.validation, 64).batch(range(4))
    ours, theirs = ({"map": x.maps(images).combined, **x.find(images).parts} for x in (loaded, detector))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-4, atol=1e-4)


def test_loading_needs_neither_a_download_nor_the_teachers_file(own_run, tiny_weights, monkeypatch, edit):
    original = timm.create_model

    def create(*arguments, pretrained=False, **settings):
        assert not pretrained
        return original(*arguments, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    edit(own_run / "config.json", lambda c: c["options"].update(teacher_weights="/gone/teacher.safetensors"))
    teacher, images = Teacher("test_resnet"), torch.rand(2, 3, 64, 64)
    teacher.load_weights(tiny_weights)
    for ours, theirs in zip(load_run(own_run, "cpu")[0].model.teacher(images), teacher(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["config.json", "calibration.json", "weights.safetensors"])
def test_a_missing_or_damaged_file_is_named(own_run, name):
    whole = (own_run / name).read_bytes()
    for content in (b"", b"\xff\xfe\x00", whole[:-100], b"[1, 2]", b"null", b"{}"):
        (own_run / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_run(own_run, "cpu")
    (own_run / name).unlink()
    with pytest.raises(UserError, match=rf"{name}|not finished"):
        load_run(own_run, "cpu")
    for folder in (own_run.parent, own_run / "nowhere"):
        with pytest.raises(UserError, match=r"is not a run folder \(it has no config.json\)"):
            load_run(folder, "cpu")


def test_weights_are_never_unpickled(own_run, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    for save in (lambda harm, path: path.write_bytes(pickle.dumps(harm)), torch.save):
        save(Harm(), own_run / "weights.safetensors")
        with pytest.raises(UserError, match="damaged"):
            load_run(own_run, "cpu")
    assert not (tmp_path / "harm").exists()


def test_weights_that_are_not_the_calibrations_or_no_numbers_give_no_scores(own_run, data_root, edit):
    weights, _ = load_tensors(own_run / "weights.safetensors")
    weights["local_student.up1.0.conv1.weight"].fill_(float("nan"))
    save_tensors(own_run / "weights.safetensors", weights)
    with pytest.raises(UserError, match=r"calibration.json was made for other weights than .*weights.safetensors"):
        load_run(own_run, "cpu")
    edit(own_run / "calibration.json", lambda calibration: calibration.pop("weights"))  # as of earlier versions
    detector, _, _ = load_run(own_run, "cpu")
    images = ImageStore(open_category(data_root, "screw_bag").validation, 64).batch([0])
    with pytest.raises(UserError, match="weights are damaged"):
        detector.maps(images)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("config.json has format 2, but this version reads format 1", lambda c: c.update(format=2)),
        ("weights.safetensors belongs to another run", lambda c: c["options"].update(gccb=16)),
        ("config.json", lambda c: c.pop("options")),
        ("config.json", lambda c: c["options"].update(shadow=1)),
        ("config.json", lambda c: c["options"].update(image_size=True)),
        ("config.json", lambda c: c["options"].pop("global_loss")),
        ("config.json", lambda c: c.update(holdout=1)),
        ("the networks of .*config.json cannot be built: image size 70", lambda c: c["options"].update(image_size=70)),
        ("config.json", lambda c: c.update(data_root=None)),
        ("calibration.json", lambda c: c.pop("threshold")),
        ("calibration.json", lambda c: c.pop("statistics")),
        ("calibration.json", lambda c: c["statistics"]["local"].update(std=0)),
        ("calibration.json", lambda c: c["threshold"].update(value=10**400)),
        ("calibration.json", lambda c: c.update(threshold=1.5)),
    ],
)
def test_an_edited_run_is_refused_in_one_sentence(own_run, message, change, edit):
    edit(own_run / ("calibration.json" if message == "calibration.json" else "config.json"), change)
    with pytest.raises(UserError, match=message) as caught:
        load_run(own_run, "cpu")
    assert str(own_run) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scoring", ["calibrated", "paper"])
def test_a_run_of_an_earlier_version_gives_the_same_scores(own_run, data_root, edit, scoring):
    """It lacks the options and entries that came later; the first had the paper's scores alone, and no other parts."""
    images = ImageStore([item.path for item in open_category(data_root, "screw_bag").test], 64).batch(range(10))
    edit(own_run / "config.json", lambda config: config["options"].update(scoring=scoring))
    detector = load_run(own_run, "cpu")[0]
    if scoring == "calibrated":
        # Parts weighed as much in maps as in scores, and patches did not count what lies beyond the border.
        detector.calibrated.map_handicap.copy_(detector.calibrated.handicap)
        detector.calibrated._part("patches").counts_beyond.fill_(0)
        state, _ = load_tensors(own_run / "scores.safetensors")
        del state["map_handicap"], state["parts.patches.counts_beyond"]
        save_tensors(own_run / "scores.safetensors", state)
        checksum = checksum_of(own_run / "scores.safetensors")
        edit(own_run / "calibration.json", lambda calibration: calibration["scores"].update(checksum=checksum))
    expected = detector.find(images)
    later = {"weights", "exposure", "chosen_parts", "precision", "by_other_images"}
    if scoring == "paper":
        (own_run / "scores.safetensors").unlink()
        later |= {"scores"}
    added = ADDED_OPTIONS.keys() - ({"scoring"} if scoring == "calibrated" else set())
    edit(own_run / "config.json", lambda config: [config["options"].pop(name) for name in added])
    edit(own_run / "calibration.json", lambda c: [c.pop(name) for name in later] + [c.update(threshold=None)])
    detector, options, _ = load_run(own_run, "cpu")
    found = detector.find(images)
    for name, scores in expected.scores.items():
        np.testing.assert_array_equal(found.scores[name], scores)
    np.testing.assert_array_equal(found.maps.combined, expected.maps.combined)
    assert found.decided_by == expected.decided_by
    assert (detector.calibrated is None) == (scoring == "paper")
    assert detector.bits is options.bits is detector.calibration.exposure is detector.calibration.threshold is None
