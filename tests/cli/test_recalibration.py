"""`recalibrate`: new good images set a run's statistics and threshold; known bad ones are reported on."""

import json
import shutil

import numpy as np
import pytest
import torch

from dskd_fast.cli import recalibration
from dskd_fast.cli.values import rate
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibrate import Caught
from dskd_fast.detection.calibration import threshold_from
from dskd_fast.runs import folder as runs
from dskd_fast.runs.folder import load_run

ONE = "global-means"


@pytest.fixture
def good(write_images, tmp_path):
    """A folder of six images that look unlike those of the training."""
    return write_images(tmp_path / "good", 6)[0].parent


@pytest.fixture
def bad(data_root):
    return data_root / "screw_bag" / "test/structural_anomalies"


@pytest.fixture
def recalibrated(cli, own_run):
    """Calibrates the run anew: recalibrated("--good", folder, ...) -> what is printed."""

    def run(*arguments):
        code, out, err = cli("recalibrate", own_run, *arguments)
        assert (code, err) == (0, "")
        return out

    return run


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def calibration(own_run):
    return json.loads((own_run / "calibration.json").read_text())


def found_in(own_run, folder):
    """Score and deciding part of each image of a folder."""
    found = load_run(own_run, "cpu")[0].find(ImageStore(sorted(folder.glob("*.png")), 64).batch([0, 1, 2]))
    return found.scores["combined"].tolist(), found.decided_by


def test_new_good_images_change_the_calibration_alone_and_the_old_one_is_kept(recalibrated, own_run, good, bad):
    before, old, scores = state(own_run), calibration(own_run), found_in(own_run, bad)
    out = recalibrated("--good", good)
    new = calibration(own_run)
    for name in ("statistics", "threshold", "exposure", "scores"):
        assert new[name] != old[name]
    assert new["n_images"] == new["threshold"]["n_images"] == 6
    assert new["weights"] == old["weights"]
    after = state(own_run)
    assert {name for name, content in before.items() if after[name] != content} == {"calibration.json"}
    value, was = (content["threshold"]["value"] for content in (new, old))
    assert f"threshold {value:.4g} (it was {was:.4g}) from 6 good images, expected false alarms 14.29%" in out
    assert found_in(own_run, bad) != scores
    (kept,) = own_run.glob("calibration-*.json")
    assert out.endswith(f"the calibration that was there is kept as {kept.name}\n")
    shutil.copy(kept, own_run / "calibration.json")
    assert found_in(own_run, bad) == scores


def test_by_its_own_images_a_run_is_calibrated_for_another_precision(recalibrated, own_run, bad):
    in_fp32, old = found_in(own_run, bad)[0], calibration(own_run)
    recalibrated("--precision", "bf16")
    new = calibration(own_run)
    assert (old["precision"], new["precision"]) == ("fp32", "bf16")
    assert (new["source"], new["n_images"]) == ("validation", old["n_images"])
    model = load_run(own_run, "cpu")[0].model
    weights = [p for name, p in model.named_parameters() if "student" in name and p.dim() == 4]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    in_bf16 = found_in(own_run, bad)[0]
    assert in_bf16 != in_fp32
    assert in_bf16 == pytest.approx(in_fp32, rel=0.2, abs=0.5)  # a network trained for three steps
    # The networks are the same as ever, and so is what they were calibrated to.
    recalibrated("--precision", "fp32")
    assert found_in(own_run, bad)[0] == pytest.approx(in_fp32, rel=1e-3, abs=1e-3)


def test_for_another_precision_new_good_images_are_asked_for_again(recalibrated, cli_error, own_run, good, edit):
    recalibrated("--good", good)
    before, message = state(own_run), "is calibrated by other images: pass their folder with --good, too"
    assert message in cli_error("recalibrate", own_run, "--precision", "fp32")
    assert state(own_run) == before
    # As versions wrote it that did not record which images they were.
    edit(own_run / "calibration.json", lambda content: content.pop("by_other_images"))
    assert message in cli_error("recalibrate", own_run, "--precision", "fp32")
    # Within the same second, perhaps.
    assert "scores are in bf16 from now on" in recalibrated("--precision", "bf16", "--good", good)
    assert len([*own_run.glob("calibration-*.json")]) == 2


def test_killed_before_the_calibration_is_written_the_run_is_the_old_one(own_run, good, cli, monkeypatch):
    old, write = state(own_run), runs.write_json

    def killed(path, content):
        if path.name == "calibration.json":
            raise SystemExit("killed")
        write(path, content)

    monkeypatch.setattr(runs, "write_json", killed)
    assert cli("recalibrate", own_run, "--good", good).code == "killed"
    assert len(list(own_run.glob("scores-*.safetensors"))) == 1
    assert state(own_run).items() > old.items()


def test_the_rate_of_false_alarms_is_a_share_or_a_percentage(recalibrated, own_run, good):
    assert [rate(text) for text in ("0.5%", "0.005", "20 %")] == [0.005, 0.005, 0.2]
    out = " ".join(recalibrated("--good", good, "--false-alarms", "0.5%").split())
    assert calibration(own_run)["threshold"]["rule"].count("at most 0.5 %") == 1
    assert "not 0.005, for which 199 are needed" in out


def test_each_bad_image_and_what_each_part_would_find_is_reported(recalibrated, own_run, good, bad):
    out = recalibrated("--good", good, "--bad", bad, "--false-alarms", "20 %")
    assert "are needed" not in out
    scores, decided_by = found_in(own_run, bad)
    threshold = calibration(own_run)["threshold"]["value"]
    lines = [line for line in out.splitlines() if line.startswith(("found ", "MISSED "))]
    for i, line in zip(np.argsort(scores), lines, strict=True):
        assert line.startswith("found" if scores[i] > threshold else "MISSED")
        assert f" by {decided_by[i]}" in line
        assert f"score {scores[i]:.4g}  {bad}/{i:03d}.png" in line
    assert f"bad images found at the threshold: {sum(s > threshold for s in scores)} of 3\n" in out
    names = (*load_run(own_run, "cpu")[0].parts, "all together")
    for name in names:
        assert f"\n  {name:14} " in out
    assert out.count("% at 0.2 false alarms\n") == len(names)


@pytest.fixture
def bad_by_one(monkeypatch):
    """Bad images of which one part has a value, and all others another: bad_by_one(detector -> value, other)."""

    def replace(of_one, other):
        def score_bad(detector, paths):
            parts = {n: np.full(len(paths), of_one(detector) if n == ONE else other) for n in detector.parts}
            return Caught(paths, parts, [ONE] * len(paths))

        monkeypatch.setattr(recalibration, "score_bad", score_bad)

    return replace


def test_chosen_parts_alone_decide_until_they_are_no_longer_chosen(recalibrated, own_run, good, bad, bad_by_one):
    def just_found(detector):
        """What the other parts, of more weight, say of the good images raises the threshold of all above this."""
        calibrated = detector.calibrated
        own = calibrated.left_out[:, detector.parts.index(ONE)]
        return threshold_from(own, calibrated.rounding(), are_left_out=True).value + 1e-3

    bad_by_one(just_found, -99.0)
    parts = load_run(own_run, "cpu")[0].parts
    out = " ".join(recalibrated("--good", good, "--bad", bad, "--choose-parts").split())
    assert "bad images found at the threshold: 3 of 3" in out
    content = calibration(own_run)
    (warning,) = (text for text in content["warnings"] if "decide" in text)
    chosen = content["chosen_parts"]
    assert ONE in chosen
    assert set(chosen) < set(parts)
    assert warning.startswith(f"only {', '.join(chosen)} decide: chosen by 3 known bad images")
    assert f"warning: {warning}" in out
    assert load_run(own_run, "cpu")[0].calibrated.used == tuple(chosen)
    assert set(found_in(own_run, bad)[1]) <= set(chosen)

    # Without bad images all decide, and where no choice of parts finds more of them.
    bad_by_one(lambda _: 99.0, 99.0)
    for more in ([], ["--bad", bad, "--choose-parts"]):
        out = recalibrated("--good", good, *more)
        assert ("all parts decide: no choice of them finds more of the bad images\n" in out) == (more != [])
        content = calibration(own_run)
        assert content["chosen_parts"] is None
        assert not any("decide" in text for text in content["warnings"])
        assert load_run(own_run, "cpu")[0].calibrated.used == parts


def test_the_papers_scoring_is_calibrated_as_well(recalibrated, cli_error, own_run, good, bad, edit):
    edit(own_run / "config.json", lambda config: config["options"].update(scoring="paper"))
    edit(own_run / "calibration.json", lambda content: content.pop("scores"))
    (own_run / "scores.safetensors").unlink()
    old = calibration(own_run)
    assert "no parts: leave" in cli_error("recalibrate", own_run, "--good", good, "--bad", bad, "--choose-parts")
    out, new = recalibrated("--good", good, "--bad", bad), calibration(own_run)
    assert new["statistics"] != old["statistics"]
    assert "scores" not in new
    assert "bad images found at the threshold: " in out
    assert "each part" not in out
    scores, decided_by = found_in(own_run, good)
    assert max(scores) < new["threshold"]["value"] != old["threshold"]["value"]
    assert decided_by == [None] * 3


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(cli_error, own_run, good, bad, tmp_path):
    before, empty = state(own_run), tmp_path / "empty"
    empty.mkdir()
    both = shutil.copytree(bad, good / "bad")
    for arguments, message in (
        ([], "nothing to calibrate by: pass a folder of good images with --good, or another --precision"),
        (["--good", good, "--choose-parts"], "--choose-parts needs known bad images"),
        (["--good", empty], f"{empty} holds no images: pass a folder of images with --good"),
        (["--good", good, "--bad", empty], f"{empty} holds no images: pass a folder of images with --bad"),
        (["--good", tmp_path / "gone"], f"there is no folder {tmp_path / 'gone'}"),
        (["--good", good, "--bad", both], f"{both / '000.png'} is among the good and the bad images"),
    ):
        assert message in cli_error("recalibrate", own_run, *arguments)
    assert state(own_run) == before
