import contextlib
import csv
import dataclasses
import io
import json
import logging
import shutil
import signal

import numpy as np
import pytest

import dskd_fast.cli.commands as commands
import dskd_fast.paper.plan as experiments
import dskd_fast.paper.reproduce as reproduction
from dskd_fast.cli import main
from dskd_fast.data.layout import open_category
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.models.teacher import WeightsUnavailable
from dskd_fast.paper.reproduce import reproduce
from dskd_fast.progress import log
from dskd_fast.runs.folder import load_run

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
        records, given = [], {"data_root": data_root, "recipe": recipe, "seeds": 1}
        handler = logging.Handler(logging.INFO)
        handler.emit = records.append
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
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
    out, aurocs = first[0], []
    for seed in (0, 1):
        run = out / RUNS / "dskd" / f"seed-{seed}"
        detector, options, _ = load_run(run, "cpu")
        assert options.seed == seed
        threshold = detector.calibration.threshold.value
        figures = evaluate(detector, open_category(data_root, "screw_bag"), threshold=threshold, batch_size=4)
        assert json.loads((run / "metrics.json").read_text()).items() >= figures.items()
        aurocs.append(figures["auroc"]["logical"])
    content = json.loads((out / "table-loco.json").read_text())
    assert [entry["auroc"]["logical"] for entry in content["figures"] if entry["row"] == "DSKD"] == aurocs
    assert content["categories"][0]["is_synthetic"]
    key = {"table": "DSKD here, by category", "row": "mean", "column": "AUROC logical"}
    with (out / "table-loco.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row.items() >= key.items())
    assert float(row["value"]) == pytest.approx(np.mean(aurocs))
    assert float(row["spread"]) == pytest.approx(np.std(aurocs, ddof=1))


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


MASK = "ground_truth/logical_anomalies/002/000.png"
DAMAGES = {
    "broken metrics": lambda run, _: (run / "metrics.json").write_text('{"auroc": '),
    "evaluate": lambda run, _: main(["evaluate", str(run), "--threshold", "0"]),
    "image": lambda _, category: (category / "test" / "good" / "003.png").unlink(),
    # Not its name or size.
    "content of a mask": lambda _, category: (category / MASK).write_bytes(bytes((category / MASK).stat().st_size)),
}


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
    assert is_same == (damage in ("broken metrics", "evaluate"))
    assert any("no sPRO of logical anomalies" in note for note in outcome.notes) == ("mask" in damage)


@pytest.mark.slow
def test_stopped_in_the_middle_it_goes_on(first, command, cli, monkeypatch, tmp_path):
    out = tmp_path / "out"

    @contextlib.contextmanager
    def stopped(title):
        yield lambda _: signal.raise_signal(signal.SIGTERM) if "seed 1" in title else None

    with monkeypatch.context() as patch:
        patch.setattr(commands, "training_progress", stopped)
        code, _, err = cli(*command, out)
    assert code == 128 + signal.SIGTERM
    assert err == "dskd-fast: stopped and saved: the same command goes on from there\n"
    finished = {name: found for name, found in state(out).items() if "seed-0" in name}
    assert len(finished) >= 5
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


def test_a_bad_category_does_not_stop_the_others(out, run_in, own_data):
    bad = {"breakfast_box": "test", "pushpins": "train/good/001.png"}
    for name in bad:
        shutil.copytree(own_data / "screw_bag", own_data / name)
    shutil.rmtree(own_data / "breakfast_box" / bad["breakfast_box"])
    (own_data / "pushpins" / bad["pushpins"]).write_bytes(b"")
    outcome, trained, _ = run_in(out, "loco", data_root=own_data)
    assert trained == []
    for failure, (name, place) in zip(outcome.failures, bad.items(), strict=True):
        assert failure.startswith(f"{name}: ")
        assert place in failure
        assert f"Failed: {failure}" in outcome.notes
    assert outcome.tables[0].rows[-1].cells[-1].value is None  # no mean that would pass for that of all


@pytest.mark.parametrize(
    ("experiment", "different", "error", "message"),
    [
        ("loco", {"teacher_weights": "nowhere.pth"}, WeightsUnavailable, "nowhere"),
        ("loco", {"image_size": 65}, UserError, "image size 65 does not fit"),
        ("ablation-temperature", {}, UserError, r'needs matplotlib.*pip install "dskd-fast\[plots\]"'),
    ],
)
def test_what_cannot_be_is_known_at_once(run_in, recipe, monkeypatch, tmp_path, experiment, different, error, message):
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


def test_the_temperatures_are_plotted(out, run_in, monkeypatch):
    pytest.importorskip("matplotlib")
    for module in (experiments, reproduction):
        monkeypatch.setattr(module, "TEMPERATURES", (0.5, 1.0))
    outcome, trained, _ = run_in(out, "ablation-temperature")
    assert trained == ["global-temperature-0.5"]
    assert [path.suffix for path in outcome.files if path.stem == "figure-ablation-temperature"] == [".png", ".svg"]
    options = load_run(out / RUNS / "global-temperature-0.5" / "seed-0", "cpu")[1]
    assert (options.temperature, options.students) == (0.5, "global")
