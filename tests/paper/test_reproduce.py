import contextlib
import csv
import dataclasses
import io
import json
import logging
import re
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import dskd_fast.cli.commands as commands
import dskd_fast.paper.plan as experiments
import dskd_fast.paper.reproduce as reproduction
from dskd_fast.cli import main
from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import MANIFEST
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.models.teacher import WeightsUnavailable
from dskd_fast.paper.reproduce import reproduce
from dskd_fast.paper.students import join
from dskd_fast.progress import log
from dskd_fast.runs.folder import WEIGHTS, load_run
from dskd_fast.training.session import start_run

RUNS = "runs/screw_bag"
RUN = f"{RUNS}/dskd/seed-0"


@pytest.fixture(scope="module")
def recipe(tiny_options):
    return tiny_options(device="cpu", gccb=None)


@pytest.fixture(scope="module")
def command(data_root, tiny_arguments):
    """`reproduce loco` with two seeds and that recipe; the output folder comes last."""
    at = tiny_arguments.index("--gccb")
    options = [*tiny_arguments[:at], *tiny_arguments[at + 2 :], "--seeds", "2", "--device", "cpu"]
    return ["reproduce", "loco", "--data-root", str(data_root), *options, "--out"]


@pytest.fixture(scope="module")
def first(command, tmp_path_factory):
    """The folder of that command, and what it printed. Read only."""
    out = tmp_path_factory.mktemp("first") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command, str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def run_in(data_root, recipe):
    """Reproduces into a folder: run_in(out, "loco", ...) -> (outcome, runs that were trained, all sentences)."""

    def run(out, experiment, **different):
        records = []
        handler = logging.Handler(logging.INFO)
        handler.emit = records.append
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            given = {"data_root": data_root, "recipe": recipe, "seeds": 1}
            outcome = reproduce(experiment, out=out, **given | different)
        finally:
            log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
        sentences = [record.getMessage() for record in records if record.module == "reproduce"]
        return outcome, [s.split(", ")[1] for s in sentences if s.endswith(": trained")], sentences

    return run


@pytest.fixture(scope="module")
def ablations(first, run_in, tmp_path_factory):
    """A copy of that folder in which further experiments ran, and what each of them gave. Read only."""
    out = shutil.copytree(first[0], tmp_path_factory.mktemp("ablations") / "out")
    return out, {name: run_in(out, name) for name in ("mvtec-ad", "ablation-students", "ablation-losses")}


@pytest.fixture
def out(first, tmp_path):
    return shutil.copytree(first[0], tmp_path / "out")


@pytest.fixture
def own_data(data_root, tmp_path):
    return shutil.copytree(data_root, tmp_path / "own data")


def state(folder):
    """Every file with its time and content, but for the tables and figures, which are written anew."""
    files = [path for part in ("runs", "pairs") for path in (folder / part).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_command_prints_the_table_and_what_exists_is_kept(first, out, run_in):
    written = (first[0] / "table-loco.txt").read_text()
    assert written in first[1]
    for text in ("DSKD, here", "0.730", "NOT run here", "epochs 1, batch size 4"):
        assert text in " ".join(written.split())
    assert str(first[0] / "examples-loco.png") in first[1].splitlines()
    before = state(out)
    outcome, _, sentences = run_in(out, "loco", seeds=2)
    assert outcome.failures == []
    assert sentences == [f"screw_bag, dskd, seed {seed}: was trained before" for seed in (0, 1)]
    assert state(out) == before
    assert {path.name: path.read_bytes() for path in outcome.files} == {
        path.name: path.read_bytes() for path in (*first[0].glob("*-loco.*"), first[0] / "examples" / "screw_bag.png")
    }
    assert len(outcome.files) == 6
    # One more seed is one more run.
    assert run_in(out, "loco", seeds=3)[1] == ["dskd"]
    assert {name: found for name, found in state(out).items() if name in before} == before


def test_the_figures_are_those_of_evaluate_and_their_mean_over_the_seeds(first, data_root):
    out = first[0]
    aurocs = []
    for seed in (0, 1):
        run = out / RUNS / "dskd" / f"seed-{seed}"
        detector, options, _ = load_run(run, "cpu")
        assert options.seed == seed
        threshold = detector.calibration.threshold.value
        figures = evaluate(detector, open_category(data_root, "screw_bag"), threshold=threshold, batch_size=4)
        metrics = json.loads((run / "metrics.json").read_text())
        assert {name: metrics[name] for name in figures} == figures
        aurocs.append(figures["auroc"]["logical"])
    content = json.loads((out / "table-loco.json").read_text())
    assert [entry["auroc"]["logical"] for entry in content["figures"] if entry["row"] == "DSKD"] == aurocs
    assert content["categories"][0]["is_synthetic"]
    with (out / "table-loco.csv").open(newline="") as file:
        rows = {(row["table"], row["row"], row["column"]): row for row in csv.DictReader(file)}
    row = rows["DSKD here, by category", "mean", "AUROC logical"]
    assert float(row["value"]) == pytest.approx(np.mean(aurocs))
    assert float(row["spread"]) == pytest.approx(np.std(aurocs, ddof=1))


def test_calibrated_figures_are_those_of_a_run_with_the_same_networks_and_that_scoring(first, data_root, tmp_path):
    category, options = open_category(data_root, "screw_bag", holdout=0), load_run(first[0] / RUN, "cpu")[1]
    assert options.scoring == "paper"
    run = start_run(tmp_path / "run", category, dataclasses.replace(options, scoring="calibrated"), holdout=0)
    figures = evaluate(run, category, threshold=None, batch_size=4)
    content = json.loads((first[0] / "table-loco.json").read_text())
    (found,) = (entry for entry in content["figures"] if "calibrated" in entry["row"] and entry["seed"] == 0)
    # The networks of a run on disk are folded, which rounds in another way.
    assert found["spro_at"].keys() == figures["spro_at"].keys()
    for one in ("auroc", "spro"):
        assert found[one] == pytest.approx(figures[one], abs=1e-3)
    for limit, spro in found["spro_at"].items():
        assert spro == pytest.approx(figures["spro_at"][limit], abs=1e-3)


def test_the_examples_are_the_median_images_with_the_maps_of_the_run(first, data_root):
    out, test = first[0], open_category(data_root, "screw_bag").test
    with (out / RUN / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = list(reproduction._medians(open_category(data_root, "screw_bag"), out / RUN / "scores.csv"))
    sheet = np.asarray(Image.open(out / "examples" / "screw_bag.png"))
    for (index, score), kind in zip(chosen, ("good", "structural", "logical"), strict=True):
        assert test[index].kind == kind
        scores = [float(row["score"]) for row in rows if row["type"] == kind]
        assert sum(s < score for s in scores) == (len(scores) - 1) // 2
        # Each photograph is in the first column, pixel by pixel (it is smaller than a tile).
        photo = np.asarray(Image.open(test[index].path).convert("RGB"))
        height, width = photo.shape[:2]
        assert sum(np.array_equal(sheet[y:][:height, 6:][:, :width], photo) for y in range(len(sheet) - height)) == 1
    np.testing.assert_array_equal(np.asarray(Image.open(out / "examples-loco.png")), sheet)


def test_the_tables_share_their_trainings(first, ablations):
    out, results = ablations
    outcome, _, sentences = results["mvtec-ad"]
    assert sentences == ["screw_bag, dskd, seed 0: was trained before"]
    assert out / "examples-mvtec-ad.png" in outcome.files
    assert any("MVTec AD was NOT run" in note for note in outcome.notes)
    assert results["ablation-students"][1] == ["global-cosine", "local-contextual-affinity"]
    # The losses need the flattened cosine as well, and nothing else.
    assert sorted(results["ablation-losses"][1]) == ["global-flattened-cosine", "local-flattened-cosine"]
    assert not any(outcome.failures for outcome, _, _ in results.values())
    before, after = state(first[0]), state(out)
    assert {name: after[name] for name in before} == before
    assert {"dskd+global-cosine", "local-contextual-affinity+dskd"} < {
        name.split("/")[2] for name in after if name.startswith("pairs/")
    }
    rows = json.loads((out / "table-ablation-losses.json").read_text())["figures"]
    assert len(rows) == 15
    assert len({json.dumps(row["auroc"]) + json.dumps(row["spro"]) for row in rows}) > 7
    # A student alone is scored by its own map.
    metrics = json.loads((out / RUN / "metrics.json").read_text())
    areas = {row.label: [cell.value for cell in row.cells] for row in results["ablation-students"][0].tables[2].rows}
    assert areas["local Pi"] == list(metrics["local"]["auroc"].values())
    assert areas["global CA"] == list(metrics["global"]["auroc"].values())
    assert areas["local Pi + global CA"] == list(metrics["auroc"].values())


def test_a_pair_has_the_maps_of_its_students_which_do_not_depend_on_the_others_loss(ablations, data_root, tmp_path):
    def detector(name):
        return load_run(ablations[0] / RUNS / name / "seed-0", "cpu")[0]

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for local, global_ in (("local-contextual-affinity", "global-cosine"), ("dskd", "global-cosine"), ("dskd", "dskd")):
        joined = join(detector(local), detector(global_)).maps(images)
        np.testing.assert_array_equal(joined.local, detector(local).maps(images).local)
        np.testing.assert_array_equal(joined.global_, detector(global_).maps(images).global_)
        np.testing.assert_allclose(joined.combined, joined.local + joined.global_, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(joined.combined, detector("dskd").maps(images).combined)

    options = dataclasses.replace(load_run(ablations[0] / RUN, "cpu")[1], global_loss="flattened-cosine")
    other = start_run(tmp_path / "run", open_category(data_root, "screw_bag"), options, holdout=0).model.state_dict()
    weights = safetensors.torch.load_file(ablations[0] / RUNS / "dskd" / "seed-0" / WEIGHTS)
    same = {name for name, tensor in weights.items() if torch.equal(tensor, other[name])}
    assert {name for name in other if name.startswith("local_")} <= same
    assert not {name for name in other if name.startswith("global_")} <= same


DAMAGES = {
    "broken metrics": lambda run, _: (run / "metrics.json").write_text('{"auroc": '),
    "evaluate": lambda run, _: main(["evaluate", str(run), "--threshold", "0"]),
    "no scores": lambda run, _: (run / "scores.csv").unlink(),
    "image": lambda _, category: (category / "test" / "good" / "003.png").unlink(),
    "mask": lambda _, category: shutil.rmtree(category / "ground_truth" / "logical_anomalies" / "002"),
    "content of a mask": lambda _, category: blank(category / MASK),  # not its name or size
}
MASK = "ground_truth/logical_anomalies/002/000.png"


def blank(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", DAMAGES)
def test_figures_are_computed_again_only_if_they_are_of_something_else(out, run_in, own_data, damage):
    before = state(out)
    DAMAGES[damage](out / RUN, own_data / "screw_bag")
    outcome, _, sentences = run_in(out, "loco", data_root=own_data)
    if damage == "content of a mask":
        (failure,) = outcome.failures
        assert failure.startswith(f"screw_bag: the mask {own_data / 'screw_bag' / MASK} is unusable")
        assert sentences.pop(1) == f"failed: {failure}"
        assert outcome.tables[1].rows[-1].cells[1].value is not None  # AUROC of logical anomalies
    else:
        assert outcome.failures == []
    assert [sentence.split(": ")[1] for sentence in sentences] == ["was trained before", "evaluated"]
    after = state(out)
    assert after[f"{RUN}/weights.safetensors"] == before[f"{RUN}/weights.safetensors"]
    is_same = after[f"{RUN}/metrics.json"][1] == before[f"{RUN}/metrics.json"][1]
    assert is_same == ("image" not in damage and "mask" not in damage)
    assert any("no sPRO of logical anomalies" in note for note in outcome.notes) == ("mask" in damage)


def test_stopped_or_killed_in_the_middle_it_goes_on(first, command, cli, fork, monkeypatch, tmp_path):
    out = tmp_path / "out"

    def sending(number):
        @contextlib.contextmanager
        def progress(title):
            yield lambda _: signal.raise_signal(number) if "seed 1" in title else None

        return progress

    with monkeypatch.context() as patch:
        patch.setattr(commands, "training_progress", sending(signal.SIGTERM))
        code, _, err = cli(*command, out)
        assert code == 128 + signal.SIGTERM
        assert err == "dskd-fast: stopped and saved: the same command goes on from there\n"
        finished = {name: found for name, found in state(out).items() if "seed-0" in name}
        assert len(finished) >= 5
        patch.setattr(commands, "training_progress", sending(signal.SIGKILL))
        assert fork(lambda: main([*command, str(out)]))() == -signal.SIGKILL
    assert not (out / "table-loco.txt").exists()
    assert not (out / RUNS / "dskd" / "seed-1" / "weights.safetensors").exists()

    code, printed, err = cli(*command, out)
    assert (code, err) == (0, "")
    assert "screw_bag, dskd, seed 0: was trained before" in printed
    assert "seed 0: evaluated" not in printed
    assert "screw_bag, dskd, seed 1: trained" in printed
    assert {name: found for name, found in state(out).items() if "seed-0" in name} == finished
    assert (out / "table-loco.csv").read_bytes() == (first[0] / "table-loco.csv").read_bytes()
    assert [path for path in out.rglob(".*") if path.is_file()] == []


def test_a_bad_category_does_not_stop_the_others(out, command, cli, own_data, tmp_path):
    bad = {"breakfast_box": "test", "pushpins": "test/good/001.png", "juice_bottle": "train/good/001.png"}
    for name, place in bad.items():
        shutil.copytree(own_data / "screw_bag", own_data / name)
        (own_data / name / MANIFEST).unlink()  # so that it passes for the paper's
        good = (own_data / name / place).rename(tmp_path / name)
        if good.is_file():
            (own_data / name / place).write_bytes(good.read_bytes()[:300])
    command = [*command[:-1], "--data-root", own_data, "--seeds", "1", "--out", out]
    code, printed, err = cli(*command)
    assert code == 2
    assert "DSKD, here" in printed
    content = json.loads((out / "table-loco.json").read_text())
    assert content["failures"] == [line.removeprefix("dskd-fast: ") for line in err.splitlines()]
    for failure, (name, place) in zip(content["failures"], bad.items(), strict=True):
        assert failure.startswith(f"{name}: ")
        assert str(own_data / name) in failure
        assert place in failure
        assert f"Failed: {failure}" in content["notes"]
    figures = content["tables"][0]["rows"][-1]["figures"]
    assert [column for column, cell in figures.items() if cell["value"] is not None] == ["screw_bag (synthetic)"]
    for name, place in bad.items():
        (tmp_path / name).replace(own_data / name / place)
    code, printed, _ = cli(*command)
    assert code == 0
    for name in bad:
        assert f"{name}, dskd, seed 0: {'was trained before' if name == 'pushpins' else 'trained'}\n" in printed
        assert f"{name}, dskd, seed 0: evaluated" in printed


def test_a_training_that_fails_leaves_its_rows_empty(ablations, run_in, monkeypatch, tmp_path):
    real = reproduction.ensure_run

    def ensure_run(folder, category, options, **arguments):
        if options.global_loss == "cosine":
            raise UserError("the loss is no longer finite")
        return real(folder, category, options, **arguments)

    monkeypatch.setattr(reproduction, "ensure_run", ensure_run)
    outcome, _, _ = run_in(shutil.copytree(ablations[0], tmp_path / "out"), "ablation-students")
    assert outcome.failures == ["screw_bag, global-cosine, seed 0: the loss is no longer finite"]
    empty = {row.label for row in outcome.tables[2].rows if row.cells[-1].value is None}
    # The local student with Pi has its figures from a pair with the one that failed.
    assert empty == {"local Pi", "global Pi", "local Pi + global Pi"}


@pytest.mark.parametrize(
    ("experiment", "different", "error", "message"),
    [
        ("loco", {"teacher_weights": "nowhere.pth"}, WeightsUnavailable, "nowhere"),
        ("loco", {"image_size": 65}, UserError, "image size 65 does not fit"),
        ("ablation-temperature", {}, UserError, r'needs matplotlib.*pip install "dskd-fast\[plots\]"'),
    ],
)
def test_what_cannot_succeed_is_known_before_anything_is_done(
    run_in, recipe, monkeypatch, tmp_path, experiment, different, error, message
):
    monkeypatch.setattr(reproduction.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        run_in(tmp_path / "new", experiment, recipe=dataclasses.replace(recipe, **different))
    # So other options can be given for the same folder.
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("different", "message"), [({"epochs": 2}, "epochs 1, not 2"), ({"lr": 1}, "lr 0.005, not 1")])
def test_another_recipe_does_not_replace_the_tables(first, run_in, recipe, different, message):
    before = (first[0] / "table-loco.txt").stat().st_mtime_ns
    with pytest.raises(UserError, match=f"was begun with {message}: choose another --out"):
        run_in(first[0], "loco", recipe=dataclasses.replace(recipe, **different))
    assert (first[0] / "table-loco.txt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--categories", "pushpins"], "no category pushpins"), (["--out", "file"], "cannot write")],
)
def test_mistakes_are_one_sentence(cli_error, command, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in cli_error(*command, "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_the_temperatures_are_plotted(out, run_in, monkeypatch):
    pytest.importorskip("matplotlib")
    for module in (experiments, reproduction):
        monkeypatch.setattr(module, "TEMPERATURES", (0.5, 1.0))
    outcome, trained, _ = run_in(out, "ablation-temperature")
    assert trained == ["global-temperature-0.5"]
    assert [path.suffix for path in outcome.files if path.stem == "figure-ablation-temperature"] == [".png", ".svg"]
    options = load_run(out / RUNS / "global-temperature-0.5" / "seed-0", "cpu")[1]
    assert (options.temperature, options.students) == (0.5, "global")


def test_condensing_blocks_are_trained_as_the_rows_say(out, run_in, monkeypatch):
    paper = experiments.read_paper()
    paper["gccb"] = [record for record in paper["gccb"] if record["g"] in (0, 512, 1024)]
    monkeypatch.setattr(experiments, "read_paper", lambda: paper)
    outcome, trained, _ = run_in(out, "ablation-gccb")
    assert outcome.failures == []
    smaller, default = re.findall(r"here (\d+)", str(outcome.tables[0]))
    assert sorted(trained) == sorted(["global-gccb-0", f"global-gccb-{smaller}"])
    assert json.loads((out / RUN / "config.json").read_text())["resolved"]["gccb"] == int(default)
