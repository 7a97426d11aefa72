"""`reproduce --methods`: rows, what is kept, and what a user may do wrong."""

import csv
import importlib.util
import json
import shutil
import signal

import pytest
import torch
from PIL import Image, ImageOps

from dskd_fast.cli import main
from dskd_fast.errors import UserError
from dskd_fast.files import load_tensors
from dskd_fast.paper.baselines import measure as measuring
from dskd_fast.paper.baselines.vm import VariationModel
from dskd_fast.paper.plan import contestants_of
from dskd_fast.paper.published import read_paper
from dskd_fast.runs.options import TrainingOptions

METHODS = ("rd", "vm", "patchcore-25", "ae")


@pytest.fixture(scope="module")
def command(data_root, tiny_arguments):
    """`reproduce loco` of some methods; the output folder comes last."""
    at = tiny_arguments.index("--gccb")
    options = [*tiny_arguments[:at], *tiny_arguments[at + 2 :], "--seeds", "1", "--device", "cpu"]
    return ["reproduce", "loco", "--data-root", str(data_root), *options, "--methods", *METHODS, "--out"]


@pytest.fixture(scope="module")
def first(command, tmp_path_factory):
    """The folder of that command. Read only."""
    out = tmp_path_factory.mktemp("first") / "out"
    assert main([*command, str(out)]) == 0
    return out


@pytest.fixture
def out(first, tmp_path):
    return shutil.copytree(first, tmp_path / "out")


def times(out, name):
    return {path: path.stat().st_mtime_ns for path in (out / "baselines").rglob(name)}


def test_each_method_has_a_row_beside_the_papers(first):
    with (first / "table-loco.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"].startswith("AUROC")]
    here = {row["row"]: row["value"] for row in rows if row["source"] == "here" and row["column"] == "AUROC mean"}
    assert list(here) == ["RD, here", "VM, here", "PatchCore-25, here", "AE, here"]
    assert all(0 <= float(value) <= 1 for value in here.values())
    assert {row["row"] for row in rows if row["source"] == "paper"} > {"RD", "VM", "PatchCore-25", "AE"}
    metrics = json.loads((first / "baselines/screw_bag/vm/seed-0/metrics.json").read_text())
    with (first / "baselines/screw_bag/vm/seed-0/scores.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    assert metrics["spro"]["mean"] is not None
    assert {*metrics["seconds"]} == {"fit", "maps"}


def test_what_is_there_is_kept_and_what_is_half_done_or_damaged_is_made_again(first, out, command, monkeypatch):
    place, before = out / "baselines/screw_bag/vm/seed-0", times(out, "metrics.json")

    def again():
        assert main([*command, str(out)]) == 0
        assert (out / "table-loco.csv").read_bytes() == (first / "table-loco.csv").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(VariationModel, "fit", lambda *_: pytest.fail("it was fitted again"))
        again()
        assert times(out, "metrics.json") == before
        (place / "metrics.json").unlink()  # as if killed before it was evaluated
        again()
    (place / "metrics.json").write_text("{")
    with (place / "arrays.safetensors").open("r+b") as file:
        file.truncate(100)
    again()


@pytest.mark.skipif(importlib.util.find_spec("anomalib") is not None, reason="anomalib is installed")
def test_without_anomalib_nothing_is_fitted(command, tmp_path, capsys):
    assert main([*command[:-1], "anomalib:Padim", "--out", str(tmp_path / "out")]) == 2
    assert "anomalib:Padim needs anomalib, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_test_images_are_evaluated_and_other_training_images_fitted_anew(out, command, own_data):
    moved = [*command[:3], str(own_data), *command[4:]]
    moved[moved.index("rd")] = "vm"

    def changed_by_mirroring(name):
        before = [times(out, file) for file in ("arrays.safetensors", "metrics.json")]
        path = own_data / "screw_bag" / name
        ImageOps.mirror(Image.open(path)).save(path)
        assert main([*moved, str(out)]) == 0
        after = [times(out, file) for file in ("arrays.safetensors", "metrics.json")]
        return [{a[path] != b[path] for path in a} for a, b in zip(before, after, strict=True)]

    assert changed_by_mirroring("test/good/000.png") == [{False}, {True}]
    assert changed_by_mirroring("train/good/000.png") == [{True}, {True}]


def test_a_signal_ends_it_after_a_step_and_the_same_command_goes_on(out, command, monkeypatch, capsys):
    place = out / "baselines/screw_bag/ae/seed-0"
    expected, _ = load_tensors(place / "arrays.safetensors")
    shutil.rmtree(place)
    heed = measuring.Fitting.heed

    def interrupted(self, stage, done, total):
        if done == 2:
            signal.raise_signal(signal.SIGINT)
        heed(self, stage, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Fitting, "heed", interrupted)
        assert main([*command, str(out)]) == 128 + signal.SIGINT
    assert "stopped and saved: the same command goes on from there" in capsys.readouterr().err
    assert not place.exists()
    assert main([*command, str(out)]) == 0
    # The same seed gives the same bits.
    found, _ = load_tensors(place / "arrays.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("experiment", "methods", "message"),
    [
        ("loco", ["pathcore"], "there is no method pathcore: use dskd, rd, "),
        ("ablation-gccb", ["dskd", "vm"], "ablation-gccb compares forms of the paper's method alone"),
    ],
)
def test_methods_that_cannot_be_are_refused_in_a_sentence(experiment, methods, message):
    with pytest.raises(UserError, match=message):
        contestants_of(experiment, TrainingOptions(), read_paper(), methods)
