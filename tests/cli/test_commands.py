import csv
import dataclasses
import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dskd_fast.cli import commands
from dskd_fast.data.augment import for_category
from dskd_fast.detection.export import Exported
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError
from dskd_fast.files import write_file
from dskd_fast.runs.options import CHOICES, TrainingOptions, recipe_options


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_evaluate_then_its_maps_then_predict_then_info_say_what_they_write(own_run, data_root, tmp_path, cli, below):
    def said(*arguments):
        code, out, err = cli(*arguments)
        assert (code, err) == (0, "")
        return out

    maps, before = tmp_path / "maps", below(own_run)
    out = said("evaluate", own_run, "--save-maps", maps)
    assert below(own_run) == sorted([*before, "metrics.json", "scores.csv"])
    metrics = read_json(own_run / "metrics.json")
    for measure, label in (("auroc", "AUROC"), ("spro", "sPRO@0.05")):
        for kind in ("structural", "logical", "mean"):
            figures = (part[measure][kind] for part in (metrics, metrics["local"], metrics["global"]))
            assert re.search(f"{label} {kind} +{' +'.join(f'{figure:.3f}' for figure in figures)}", out)
    for name, areas in metrics["parts"].items():
        n = sum(of_kind[name] for of_kind in metrics["decided_by"].values())
        assert re.search(f" {name} +{areas['structural']:.3f} +{areas['logical']:.3f} +{n} *\n", out)
    assert re.search(r"called anomalous at threshold .*: \d of 4 good, \d of 3 structural, \d of 3 logical", out)

    arguments = ["evaluate-maps", maps, "--data-root", data_root, "--category", "screw_bag"]
    out = said(*arguments, "--out", tmp_path / "deep" / "f.json")
    of_maps = read_json(tmp_path / "deep" / "f.json")
    assert of_maps["spro_at"] == metrics["spro_at"]
    assert "image score: maximum of the map" in out
    assert all(f"{value:.3f}" in out for value in of_maps["auroc"].values())
    assert "cannot write" in cli(*arguments, "--out", tmp_path).err

    out = said("predict", own_run, data_root / "screw_bag" / "test", "--out", tmp_path / "results")
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    assert {float(row["threshold"]) for row in rows} == {metrics["threshold"]}
    assert f"10 images scored, {sum(r['decision'] == 'anomalous' for r in rows)} anomalous (score above " in out

    shown = json.loads(said("info", own_run))
    assert shown.items() > read_json(own_run / "config.json").items()
    assert shown["calibration"] == read_json(own_run / "calibration.json")
    assert shown["last_epoch"] == read_json(own_run / "history.json")[-1]
    assert shown["metrics"] == metrics
    assert shown["parts"] == {name: PARTS[name].meaning for name in metrics["parts"]}


@pytest.fixture
def asked_for(cli_error, monkeypatch):
    """Calls `train`, and returns the category, the options and the holdout, without a training."""

    def run(*arguments):
        asked = []

        def start_run(out, category, options, *, holdout, **_):
            asked.extend((category, options, holdout))
            raise UserError("enough")

        monkeypatch.setattr(commands, "start_run", start_run)
        assert cli_error("train", *arguments) == "dskd-fast: enough\n"
        return asked

    return run


def test_every_option_arrives(asked_for, write_images, tmp_path):
    write_images(tmp_path / "part", 10)
    options = {"teacher": "lite", "teacher_weights": "w.pth", "image_size": 64, "gccb": 0, "epochs": 2, "batch_size": 3}
    options |= {"warmup": 0.1, "averaging": 0.5, "lr": 0.001, "temperature": 0.5, "sigma": 1.5, "seed": 5, "bits": 12}
    options |= {name: choices[1] for name, choices in CHOICES.items()}
    more = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    flags = {"filter_maps": True, "align_corners": True, "compile": True}
    more += [f"--{name.replace('_', '-')}" for name in flags]
    arguments = ["--data-root", tmp_path / "part", "--augment", "hflip,rotate=2", "--holdout", 0]
    category, found, holdout = asked_for(*arguments, *more)
    assert dataclasses.asdict(found) == options | flags | {"augmentation": "hflip,rotate=2"}
    assert all(value != getattr(TrainingOptions(), name) for name, value in dataclasses.asdict(found).items())
    assert (len(category.train), holdout) == (10, 0)


@pytest.mark.parametrize(
    ("given", "recipe"),
    [("--teacher lite", "fast"), ("--teacher resnet18", "paper"), ("", "paper"), ("--recipe fast", "fast"),
     ("--teacher lite --recipe paper", "paper")],
)  # fmt: skip
def test_the_recipe_is_the_teachers_or_the_one_that_is_given(asked_for, write_images, tmp_path, given, recipe):
    write_images(tmp_path / "part", 20)
    category, options, _ = asked_for("--data-root", tmp_path / "part", *given.split())
    assert len(category.train) == 18
    of_recipe = recipe_options(recipe, 18, {"teacher": options.teacher})
    assert options == TrainingOptions(**of_recipe, augmentation=for_category("part", recipe).to_text())
    assert options.teacher == (given.split()[1] if "--teacher" in given else TrainingOptions.teacher)


def test_the_device_is_the_one_that_is_asked_for(cli_error, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command, *more in (["evaluate"], ["predict", tmp_path], ["report", "--out", tmp_path / "page"]):
        assert "no usable GPU" in cli_error(command, tiny_run, *more, "--device", "cuda")


def test_values_above_a_cameras_bits_are_named_by_all_that_reads_images_of_a_run(
    cli, cli_error, own_run, edit, tmp_path
):
    for folder, largest in (("train/good", 4095), ("test/good", 4095), ("test/bad", 4096)):
        (tmp_path / "part" / folder).mkdir(parents=True)
        image = Image.fromarray(np.linspace(0, largest, 40 * 48).reshape(40, 48).astype(np.uint16))
        image.save(tmp_path / "part" / folder / "0.png")
    edit(own_run / "config.json", lambda config: config["options"].update(bits=12))
    code, out, _ = cli("predict", own_run, tmp_path / "part" / "test", "--out", tmp_path / "out")
    assert code == 1
    assert "1 images scored" in out
    assert "bad/0.png: it holds the value 4096, above 4095, the largest of 12 bits" in out
    for command in (["evaluate", own_run], ["report", own_run, "--out", tmp_path / "report"]):
        assert "it holds the value 4096" in cli_error(*command, "--data-root", tmp_path / "part")


def test_image_files_that_are_not_used_are_named_wherever_they_count_and_paths_shown_as_they_are(
    cli, tiny_arguments, write_images, tmp_path
):
    # Brackets and colons must not be taken for markup.
    root, run = tmp_path / "[b] größe", tmp_path / "a[/]b [red] :smile:" / "run"
    for seed, folder in enumerate(("train/good", "test/good", "test/bad\x1b[2J")):
        write_images(root / folder, 2, seed=seed // 2)
    (root / "test" / "bad\x1b[2J" / "x.heic").touch()
    message = r"not used: 1 image file (formats that are not read): test/bad\u001b[2J/x.heic"
    code, out, _ = cli("train", "--data-root", root, *tiny_arguments, "--out", run)
    assert code == 0
    assert {message, f"trained on 2 images, run in {run}"} <= {*out.splitlines()}
    assert "no threshold: there are no validation images" in out
    assert out.endswith(f"next: dskd-fast evaluate '{run}'   or   dskd-fast predict '{run}' IMAGES\n")

    code, out, _ = cli("evaluate", run, "--save-maps", tmp_path / "maps")
    reasons = read_json(run / "metrics.json")["absent"]
    assert code == 0 < len(reasons)
    said = {rf"absent: {reason}".replace("\x1b", r"\u001b") for reason in reasons}
    assert {message, *said} <= {*out.splitlines()}
    assert "None" not in out


def test_without_a_threshold_or_that_check_there_are_no_decisions_and_suspects_and_this_is_said(
    cli, own_run, edit, dead_frames, tmp_path
):
    Image.fromarray(dead_frames["black"][0]).save(tmp_path / "black.png")

    def predicted(*more):
        code, out, _ = cli("predict", own_run, tmp_path / "black.png", "--out", tmp_path / "results", *more)
        assert code == 0
        (row,) = read_rows(tmp_path / "results" / "predictions.csv")
        assert row["score"]
        return out, row["decision"]

    said = "1 images scored, 0 anomalous (score above 1e+06), 1 suspect (why: predictions.csv)"
    assert said in predicted("--threshold", 1e6)[0]
    assert "suspect" not in json.loads(cli("info", own_run).out)
    edit(own_run / "calibration.json", lambda c: [c.pop("exposure"), c.pop("warnings"), c.update(threshold=None)])
    out, decision = predicted()
    assert "no decisions: the run had no validation images" in out
    assert "suspect" not in out
    assert decision == ""
    assert "from before there was that check" in json.loads(cli("info", own_run).out)["suspect"]
    out, decision = predicted("--threshold", "1e9")
    assert "no decisions" not in out
    assert decision == "normal"


def test_bad_masks_are_all_named_beside_the_figures_that_need_none(cli, own_run, own_data, tmp_path):
    bad = [own_data / "screw_bag" / "ground_truth" / "logical_anomalies" / n / "000.png" for n in ("000", "001")]
    for path in bad:
        path.write_bytes(b"garbage")
    for command, *arguments in (
        ["evaluate", own_run, "--threshold=-1e9", "--save-maps", tmp_path / "maps"],
        ["evaluate-maps", tmp_path / "maps", "--category", "screw_bag"],
        ["report", own_run, "--out", tmp_path / "page"],
    ):
        code, out, err = cli(command, *arguments, "--data-root", own_data)
        assert (code, err) == (1, "")
        lines = [line for line in out.splitlines() if line.startswith("bad mask: ")]
        for path, line in zip(bad, lines, strict=True):
            assert f"the mask {path} is unusable: it is no PNG" in line
        assert "absent: no sPRO of logical anomalies: masks of category screw_bag cannot be used" in out
        if command != "report":
            assert re.search(r"AUROC logical +[01]\.\d{3}", out)
            assert re.search(r"sPRO@0.05 logical +-", out)
        if command == "evaluate":
            assert "threshold -1e+09: 4 of 4 good, 3 of 3 structural, 3 of 3 logical" in out


def test_what_is_not_inspected_is_listed_and_only_photographs_make_a_failure(
    cli, tiny_run, write_images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 3)[1].write_bytes(b"\x89PNG garbage")
    (tmp_path / "images" / "x\n\x1b[2J.gif").touch()
    assert cli("predict", tiny_run, "images/000.png", "--out", "images/earlier").code == 0
    code, out, err = cli("predict", tiny_run, "images", "--save-maps")
    assert (code, err) == (1, "")
    assert re.search(r"^2 images scored.*, 2 NOT inspected; results in predictions\n", out)
    assert "skipped: images/earlier/overlays: 1 image file" in out
    assert "not read: images/001.png: " in out
    assert r"not read: images/x\n\u001b[2J.gif: .gif files are not read" in out
    assert "\x1b" not in out
    rows = read_rows(tmp_path / "predictions" / "predictions.csv")
    assert [bool(row["score"]) for row in rows] == [True, False, True, False, False]
    assert len(list((tmp_path / "predictions" / "maps").iterdir())) == 2

    shutil.rmtree(tmp_path / "predictions")
    (tmp_path / "images" / "x\n\x1b[2J.gif").unlink()
    (tmp_path / "images" / "001.png").unlink()
    assert cli("predict", tiny_run, "images").code == 0


def test_info_names_a_damaged_file_of_a_run(cli, cli_error, own_run, edit):
    (own_run / "scores.safetensors").write_bytes(b"\xff")
    assert "scores.safetensors" in cli_error("info", own_run)
    edit(own_run / "calibration.json", lambda content: content["scores"].update(file="gone"))
    assert "gone is missing" in cli_error("info", own_run)
    edit(own_run / "calibration.json", lambda content: content.pop("scores"))
    assert list(json.loads(cli("info", own_run).out)["parts"]) == ["local", "global"]  # by the paper's scoring
    # Each is looked at before those above it.
    damages = {"metrics": (b"5", b'{"local": 1}'), "calibration": (b"\xff", b"[]", b"{}"), "history": (b"{}", b"[]")}
    for name, contents in damages.items():
        for content in contents:
            (own_run / f"{name}.json").write_bytes(content)
            assert f"{name}.json" in cli_error("info", own_run)


@pytest.mark.parametrize(("file_format", "name"), [("torch", "model.pt2"), ("openvino", "model.xml")])
def test_export_writes_into_the_run_and_says_what_the_file_is(own_run, cli, edit, monkeypatch, file_format, name):
    asked = []

    def export(detector, path, file_format, **metadata):
        asked.append((path, file_format, metadata))
        return Exported(path, 1_500_000, metadata | {"inputs": {"images": "uint8 (batch, 3, height, width)"}}, 2e-6)

    monkeypatch.setattr(commands, "export_detector", export)
    code, out, err = cli("export", own_run, "--format", file_format, "--threshold", "1.5")
    assert (code, err) == (0, "")
    for message in ("category     screw_bag", "threshold    1.5", "images: uint8 (batch, 3, height, width)"):
        assert message in out
    assert f"{name}, 1.5 MB; differs from this run by at most 2.0e-06" in out
    edit(own_run / "calibration.json", lambda content: content.update(threshold=None))
    assert "no decisions" in cli("export", own_run, "--format", file_format).out
    expected = [{"category": "screw_bag", "threshold": threshold} for threshold in (1.5, None)]
    assert asked == [(own_run / name, file_format, metadata) for metadata in expected]


def test_sigterm_leaves_nothing_half_written(cli, tiny_run, tmp_path, monkeypatch, below):
    """As from `timeout`, a service manager or `docker stop`."""

    def write(temporary):
        temporary.write_text("half")
        signal.raise_signal(signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(commands, "export_detector", lambda detector, path, *_, **__: write_file(path, write))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, _, err = cli("export", tiny_run, "--format", "torch", "--out", tmp_path / "out" / "model.pt2")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, err) == (143, "dskd-fast: terminated; no file was left half written\n")
    assert below(tmp_path) == ["out"]
