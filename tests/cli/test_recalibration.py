"""`recalibrate`: new good images set a run's statistics and threshold; known bad ones are reported on."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dskd_fast.cli import recalibration
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.calibrate import Caught
from dskd_fast.detection.calibration import threshold_from
from dskd_fast.detection.scoring.calibrated import PARTS, soft_maximum
from dskd_fast.runs import folder as runs
from dskd_fast.runs.folder import load_run

BAD = "test/structural_anomalies"


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def papers_run(run, edit):
    """The same networks by the paper's scoring."""
    edit(run / "config.json", lambda config: config["options"].update(scoring="paper"))
    edit(run / "calibration.json", lambda calibration: calibration.pop("scores"))
    (run / "scores.safetensors").unlink()
    return run


@pytest.fixture
def good(write_images, tmp_path):
    """A folder of six images that look unlike those of the training."""
    return write_images(tmp_path / "good", 6)[0].parent


@pytest.fixture
def bad(data_root):
    return data_root / "screw_bag" / BAD


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def calibration(run):
    return json.loads((run / "calibration.json").read_text())


def found_in(run, folder):
    """Score and deciding part of each image of a folder."""
    found = load_run(run, "cpu")[0].find(ImageStore(sorted(folder.glob("*.png")), 64).batch([0, 1, 2]))
    return found.scores["combined"].tolist(), found.decided_by


def test_new_good_images_change_statistics_and_threshold_and_not_the_weights(cli, run, good):
    before, old = state(run), calibration(run)
    code, out, err = cli("recalibrate", run, "--good", good)
    assert (code, err) == (0, "")
    new = calibration(run)
    for name in ("statistics", "threshold", "exposure", "scores"):
        assert new[name] != old[name]
    assert new["n_images"] == new["threshold"]["n_images"] == 6
    assert new["weights"] == old["weights"]
    after = state(run)
    assert {name for name, content in before.items() if after[name] != content} == {"calibration.json"}
    value, was = (content["threshold"]["value"] for content in (new, old))
    assert f"threshold {value:.4g} (it was {was:.4g}) from 6 good images, expected false alarms 14.29%" in out


def test_by_its_own_images_a_run_is_calibrated_for_another_precision_in_which_it_then_scores(cli, run, bad):
    in_fp32, old = found_in(run, bad)[0], calibration(run)
    code, _, err = cli("recalibrate", run, "--precision", "bf16")
    new = calibration(run)
    assert (code, err, old["precision"], new["precision"]) == (0, "", "fp32", "bf16")
    assert new["source"] == "validation"
    assert new["n_images"] == old["n_images"]
    detector = load_run(run, "cpu")[0]
    weights = [p for name, p in detector.model.named_parameters() if "student" in name and p.dim() == 4]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    in_bf16 = found_in(run, bad)[0]
    assert in_bf16 != in_fp32
    assert in_bf16 == pytest.approx(in_fp32, rel=0.2, abs=0.5)  # a network trained for three steps
    code, _, err = cli("export", run, "--format", "torch")
    assert (code, "recalibrate" in err) == (2, True)
    # The networks are the same as ever, and so is what they were calibrated to.
    assert cli("recalibrate", run, "--precision", "fp32").code == 0
    assert found_in(run, bad)[0] == pytest.approx(in_fp32, rel=1e-3, abs=1e-3)
    code, _, err = cli("recalibrate", run)
    assert (code, "--good" in err) == (2, True)


def test_for_another_precision_new_good_images_are_not_given_up_for_the_runs_own(cli, cli_error, run, good, edit):
    assert cli("recalibrate", run, "--good", good).code == 0
    before, message = state(run), "is calibrated by other images: pass their folder with --good, too"
    assert message in cli_error("recalibrate", run, "--precision", "fp32")
    assert state(run) == before
    # As versions wrote it that did not record which images they were.
    edit(run / "calibration.json", lambda content: content.pop("by_other_images"))
    assert message in cli_error("recalibrate", run, "--precision", "fp32")
    code, out, _ = cli("recalibrate", run, "--precision", "bf16", "--good", good)  # within the same second, perhaps
    assert (code, "scores are in bf16 from now on" in out) == (0, True)
    assert len([*run.glob("calibration-*.json")]) == 2


def test_a_rate_of_false_alarms_is_not_ignored_where_there_are_no_images_to_set_a_threshold_by(
    cli_error, run, monkeypatch
):
    find = runs.find_category
    monkeypatch.setattr(runs, "find_category", lambda *a, **k: replace(find(*a, **k), validation=[]))
    message = cli_error("recalibrate", run, "--precision", "fp32", "--false-alarms", "1%")
    assert "no validation images to set a threshold by: leave --false-alarms out" in message


def test_new_good_images_are_then_normal_and_were_anomalous(run, good, cli):
    def anomalous():
        detector = load_run(run, "cpu")[0]
        return [one.score > detector.calibration.threshold.value for one in detector.predict(sorted(good.iterdir()))]

    assert all(anomalous())
    assert cli("recalibrate", run, "--good", good).code == 0
    assert not any(anomalous())


def test_the_old_calibration_is_kept_and_counts_again_where_it_is_copied_back(cli, run, good, bad):
    scores, old = found_in(run, bad), state(run)["calibration.json"]
    out = cli("recalibrate", run, "--good", good).out
    (kept,) = run.glob("calibration-*.json")
    assert out.endswith(f"the calibration that was there is kept as {kept.name}\n")
    assert json.loads(kept.read_bytes()) == json.loads(old)
    assert found_in(run, bad) != scores
    shutil.copy(kept, run / "calibration.json")
    assert found_in(run, bad) == scores


def test_killed_before_the_calibration_is_written_the_run_is_the_old_one(run, good, bad, cli, monkeypatch):
    scores, old = found_in(run, bad), state(run)
    write = runs.write_json

    def killed(path, content):
        if path.name == "calibration.json":
            raise SystemExit("killed")
        write(path, content)

    monkeypatch.setattr(runs, "write_json", killed)
    assert cli("recalibrate", run, "--good", good).code == "killed"
    assert len(list(run.glob("scores-*.safetensors"))) == 1
    assert state(run).items() > old.items()
    assert found_in(run, bad) == scores


@pytest.mark.parametrize(("text", "rate"), [("0.5%", "0.005"), ("0.005", "0.005"), ("20 %", "0.2")])
def test_the_rate_of_false_alarms_is_a_share_or_a_percentage(cli, run, good, text, rate):
    out = " ".join(cli("recalibrate", run, "--good", good, "--false-alarms", text).out.split())
    assert calibration(run)["threshold"]["rule"].count(f"at most {100 * float(rate):g} %") == 1
    assert (f"not {rate}, for which 199 are needed" in out) == (rate == "0.005")


def test_a_run_that_had_no_threshold_gets_one(cli, run, good, edit):
    edit(run / "calibration.json", lambda content: content.update(threshold=None, source="train"))
    out = cli("recalibrate", run, "--good", good).out
    threshold = load_run(run, "cpu")[0].calibration.threshold
    assert f"threshold {threshold.value:.4g} (it was none) from 6 good images" in out


def test_too_few_images_say_what_they_can_promise_and_how_many_are_needed(cli, run, good):
    out = " ".join(cli("recalibrate", run, "--good", good).out.split())
    promise = (
        "6 normal images can promise 0.14 false alarms at best, not 0.01, for which 99 are needed: the threshold is "
        "above the highest score of them"
    )
    assert f"warning: {promise}" in out
    assert promise in calibration(run)["warnings"]


def test_bad_images_alone_change_nothing(cli, run, good, bad, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    assert cli("recalibrate", run, "--good", good).code == 0
    code, out, _ = cli("recalibrate", other, "--good", good, "--bad", bad)
    assert code == 0
    assert "bad images found at the threshold: " in out
    ours, theirs = (sorted(folder.iterdir()) for folder in (run, other))
    assert [without_date(path) for path in ours] == [without_date(path) for path in theirs]


def without_date(path):
    """Name and content of a run's file."""
    return tuple(re.sub(rb"-\d{8}-\d{6}", b"", part) for part in (path.name.encode(), path.read_bytes()))


def test_each_bad_image_is_reported_with_what_decided_and_each_part_with_what_it_would_find(cli, run, good, bad):
    out = cli("recalibrate", run, "--good", good, "--bad", bad).out
    scores, decided_by = found_in(run, bad)
    threshold = calibration(run)["threshold"]["value"]
    lines = [line for line in out.splitlines() if line.startswith(("found ", "MISSED "))]
    for i, line in zip(np.argsort(scores), lines, strict=True):
        assert line.startswith("found" if scores[i] > threshold else "MISSED")
        assert f" by {decided_by[i]}" in line
        assert f"score {scores[i]:.4g}  {bad}/{i:03d}.png" in line
    assert f"bad images found at the threshold: {sum(s > threshold for s in scores)} of 3\n" in out
    names = (*load_run(run, "cpu")[0].parts, "all together")
    for name in names:
        assert f"\n  {name:14} " in out
    assert out.count("% at 0.2 false alarms\n") == len(names)


def test_chosen_parts_alone_decide_and_the_run_says_so_until_it_is_calibrated_without_them(
    cli, run, good, bad, monkeypatch
):
    monkeypatch.setattr(recalibration, "score_bad", found_by_local_alone)
    assert load_run(run, "cpu")[0].calibrated.used == load_run(run, "cpu")[0].parts
    out = " ".join(cli("recalibrate", run, "--good", good, "--bad", bad, "--choose-parts").out.split())
    assert "bad images found at the threshold: 3 of 3" in out
    content = calibration(run)
    (warning,) = (text for text in content["warnings"] if "decide" in text)
    chosen = content["chosen_parts"]
    assert "local" in chosen
    assert set(chosen) < set(load_run(run, "cpu")[0].parts)
    assert warning.startswith(f"only {', '.join(chosen)} decide: chosen by 3 known bad images")
    assert f"warning: {warning}" in out
    detector = load_run(run, "cpu")[0]
    assert detector.calibrated.used == tuple(content["chosen_parts"]) == tuple(detector.calibration.chosen_parts)
    assert set(found_in(run, bad)[1]) <= set(chosen)

    monkeypatch.setattr(runs, "replace_calibration", lambda folder, detector, _: save(folder, detector))
    assert cli("recalibrate", run, "--good", good).code == 0
    assert load_run(run, "cpu")[0].calibrated.used == detector.parts
    assert calibration(run)["chosen_parts"] is None


def test_where_no_choice_of_parts_finds_more_all_decide_and_nothing_was_chosen(cli, run, good, bad, monkeypatch):
    monkeypatch.setattr(recalibration, "score_bad", found_by_all)
    out = cli("recalibrate", run, "--good", good, "--bad", bad, "--choose-parts").out
    assert "all parts decide: no choice of them finds more of the bad images\n" in out
    content = calibration(run)
    assert content["chosen_parts"] is None
    assert not any("decide" in text for text in content["warnings"])
    detector = load_run(run, "cpu")[0]
    assert detector.calibrated.used == detector.parts


def test_of_equal_choices_of_as_many_parts_the_one_of_most_weight_is_chosen(run):
    """Each of two parts finds one of two bad images; both together find none, and so does every other choice."""
    detector = load_run(run, "cpu")[0]
    names = detector.parts
    two = [f(names, key=lambda name: PARTS[name].weight) for f in (min, max)]
    detector.calibrated.left_out = np.array([[0.0 if name in two else 50.0 for name in names]] * 6)
    # Two equal values together are more than one.
    above = 0.5 * float(soft_maximum(torch.zeros(1, 2)))
    values = {name: np.full(2, -50.0) for name in names} | {two[0]: [above, -50.0], two[1]: [-50.0, above]}
    recalibration._choose_parts(detector, Caught([], {k: np.array(v) for k, v in values.items()}, [None] * 2), 0.01)
    assert detector.calibration.chosen_parts == two[1:]


@pytest.mark.parametrize("written", [["metrics.json"], ["model.pt2", "model.onnx"], []])
def test_what_was_written_by_the_calibration_before_is_named(cli, run, good, written):
    for name in written:
        (run / name).touch()
    out = " ".join(cli("recalibrate", run, "--good", good).out.split())
    line = f"of the calibration before, in {run}: {', '.join(written)}; evaluate or export again"
    assert (line in out) == ("of the calibration before" in out) == bool(written)


def test_a_copy_among_good_and_bad_images_is_refused(cli_error, run, good, bad, tmp_path):
    before, mine = state(run), shutil.copytree(bad, tmp_path / "bad")
    copy = shutil.copy(good / "002.png", mine / "another name.png")
    assert f"{copy} is among the good and the bad images" in cli_error(
        "recalibrate", run, "--good", good, "--bad", mine
    )
    assert state(run) == before


def found_by_all(detector, paths):
    return Caught(paths, {name: np.full(len(paths), 99.0) for name in detector.parts}, ["local"] * len(paths))


def found_by_local_alone(detector, paths):
    """What the other parts say of the good images raises the threshold of all above this."""
    calibrated = detector.calibrated
    value = threshold_from(calibrated.left_out[:, 0], calibrated.rounding(), are_left_out=True).value + 1e-3
    parts = {name: np.full(len(paths), value if name == "local" else -99.0) for name in detector.parts}
    return Caught(paths, parts, ["local"] * len(paths))


def save(folder, detector):
    """Two calibrations within a second have no names of their own."""
    runs.save_calibration(folder, detector, "scores-later.safetensors")
    return "calibration-later.json"


def test_the_papers_scoring_is_calibrated_as_well(cli, papers_run, good, bad):
    old = calibration(papers_run)
    code, out, _ = cli("recalibrate", papers_run, "--good", good, "--bad", bad)
    assert code == 0
    new = calibration(papers_run)
    assert new["statistics"] != old["statistics"]
    assert new["threshold"]["value"] != old["threshold"]["value"]
    assert "scores" not in new
    assert "bad images found at the threshold: " in out
    assert "each part" not in out
    scores, decided_by = found_in(papers_run, good)
    assert max(scores) < new["threshold"]["value"]
    assert decided_by == [None] * 3


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(cli_error, run, good, bad, tmp_path):
    before, empty = state(run), tmp_path / "empty"
    empty.mkdir()
    both = shutil.copytree(bad, good / "bad")
    for arguments, message in (
        (["--good", good, "--choose-parts"], "--choose-parts needs known bad images"),
        (["--good", empty], f"{empty} holds no images: pass a folder of images with --good"),
        (["--good", good, "--bad", empty], f"{empty} holds no images: pass a folder of images with --bad"),
        (["--good", tmp_path / "gone"], f"there is no folder {tmp_path / 'gone'}"),
        (["--good", good, "--bad", both], f"{both / '000.png'} is among the good and the bad images"),
    ):
        assert message in cli_error("recalibrate", run, *arguments)
    assert state(run) == before


def test_the_papers_scores_have_no_parts_to_choose(cli_error, papers_run, good, bad):
    before = state(papers_run)
    message = cli_error("recalibrate", papers_run, "--good", good, "--bad", bad, "--choose-parts")
    assert f"{papers_run} has the paper's scores, which have no parts" in message
    assert state(papers_run) == before


def test_a_bad_file_among_the_images_is_named_and_changes_nothing(cli_error, run, good):
    before = state(run)
    (good / "003.png").write_bytes(b"no image")
    assert str(good / "003.png") in cli_error("recalibrate", run, "--good", good)
    assert state(run) == before
