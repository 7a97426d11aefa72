import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dskd_fast.paper.plan as experiments
import dskd_fast.paper.reproduce as reproduction
from dskd_fast.cli import main
from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import MANIFEST
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.models.teacher import WeightsUnavailable
from dskd_fast.paper.reproduce import join, reproduce
from dskd_fast.runs.folder import load_run
from dskd_fast.training.session import start_run

RUN = "runs/screw_bag/dskd/seed-0"
FIGURES = ("auroc", "spro", "spro_at", "local", "global", "decisions")


@pytest.fixture
def recipe(tiny_options):
    return tiny_options(device="cpu")


def without_gccb(arguments):
    """The options of `train` that `reproduce` has as well."""
    at = arguments.index("--gccb")
    return [*arguments[:at], *arguments[at + 2 :]]


@pytest.fixture
def run_tiny(data_root, recipe, tmp_path):
    """Reproduces into tmp_path / "out": run_tiny("loco", ...) -> (outcome, sentences that were told)."""

    def run(experiment, **arguments):
        told = []
        given = {"data_root": data_root, "out": tmp_path / "out", "recipe": recipe, "seeds": 1, "tell": told.append}
        return reproduce(experiment, **given | arguments), told

    return run


@pytest.fixture
def two_categories(data_root, tmp_path):
    """The synthetic category, and one more that passes for LOCO's juice bottle."""
    root = tmp_path / "two"
    shutil.copytree(data_root / "screw_bag", root / "screw_bag")
    shutil.copytree(data_root / "screw_bag", root / "juice_bottle")
    (root / "juice_bottle" / MANIFEST).unlink()
    return root


def state(folder):
    """Every file with its time and content, but for the tables and figures, which are written anew."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for part in ("runs", "pairs")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }


def test_what_is_there_is_kept_and_the_tables_are_the_same(run_tiny, tmp_path):
    first, told = run_tiny("loco", seeds=2)
    assert first.failures == []
    assert [sentence for sentence in told if sentence.endswith(": trained")] == [
        f"screw_bag, dskd, seed {seed}: trained" for seed in (0, 1)
    ]
    assert {path.name for path in first.files} == {
        *(f"table-loco.{suffix}" for suffix in ("txt", "md", "csv", "json")),
        "examples-loco.png",
        "screw_bag.png",
    }
    before = state(tmp_path / "out")
    written = {path: path.read_bytes() for path in first.files}
    again, told = run_tiny("loco", seeds=2)
    assert {sentence.split(": ")[1] for sentence in told} == {"was trained before"}
    assert state(tmp_path / "out") == before
    assert {path: path.read_bytes() for path in again.files} == written
    # One more seed is one more run.
    _, told = run_tiny("loco", seeds=3)
    assert "screw_bag, dskd, seed 2: trained" in told
    assert {name: found for name, found in state(tmp_path / "out").items() if name in before} == before


def test_the_figures_are_those_of_evaluate_and_their_mean_over_the_seeds(run_tiny, data_root, tmp_path):
    outcome, _ = run_tiny("loco", seeds=2)
    category = open_category(data_root, "screw_bag")
    found = []
    for seed in (0, 1):
        run = tmp_path / "out" / "runs" / "screw_bag" / "dskd" / f"seed-{seed}"
        detector, options, _ = load_run(run, "cpu")
        assert options.seed == seed
        threshold = detector.calibration.threshold.value
        figures = evaluate(detector, category, threshold=threshold, batch_size=4)
        metrics = json.loads((run / "metrics.json").read_text())
        assert {name: metrics[name] for name in FIGURES} == {name: figures[name] for name in FIGURES}
        found.append(figures)
    aurocs = [figures["auroc"]["logical"] for figures in found]
    details = outcome.tables[2].rows[0]
    cell = details.cells[1]
    assert (cell.value, cell.spread) == (pytest.approx(np.mean(aurocs)), pytest.approx(np.std(aurocs, ddof=1)))
    content = json.loads((tmp_path / "out" / "table-loco.json").read_text())
    assert [entry["auroc"]["logical"] for entry in content["figures"]] == aurocs
    assert content["categories"][0]["is_synthetic"]
    with (tmp_path / "out" / "table-loco.csv").open(newline="") as file:
        rows = {(row["table"], row["row"], row["column"]): row for row in csv.DictReader(file)}
    assert float(rows["DSKD here, by category", "mean", "AUROC logical"]["value"]) == cell.value


def test_the_tables_share_their_trainings(run_tiny, tmp_path):
    run_tiny("loco")
    before = state(tmp_path / "out")
    outcome, told = run_tiny("mvtec-ad")
    assert told == ["screw_bag, dskd, seed 0: was trained before"]
    assert tmp_path / "out" / "examples-mvtec-ad.png" in outcome.files
    assert any("MVTec AD was NOT run" in note for note in outcome.notes)
    outcome, told = run_tiny("ablation-students")
    assert outcome.failures == []
    trained = [sentence for sentence in told if sentence.endswith(": trained")]
    assert trained == [f"screw_bag, {name}, seed 0: trained" for name in ("global-cosine", "local-contextual-affinity")]
    after = state(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    pairs = {name.split("/")[2] for name in after if name.startswith("pairs/")}
    assert pairs == {"dskd+global-cosine", "local-contextual-affinity+dskd"}
    # The losses need the flattened cosine as well, and nothing else.
    _, told = run_tiny("ablation-losses")
    trained = [sentence.split(", ")[1] for sentence in told if sentence.endswith(": trained")]
    assert sorted(trained) == ["global-flattened-cosine", "local-flattened-cosine"]
    rows = json.loads((tmp_path / "out" / "table-ablation-losses.json").read_text())["figures"]
    assert len(rows) == 15
    assert len({json.dumps(row["auroc"]) + json.dumps(row["spro"]) for row in rows}) > 7


def test_a_student_alone_is_scored_by_its_own_map(run_tiny, tmp_path):
    outcome, _ = run_tiny("ablation-students")
    metrics = json.loads((tmp_path / "out" / RUN / "metrics.json").read_text())
    areas = {row.label: [cell.value for cell in row.cells] for row in outcome.tables[2].rows}
    assert areas["local Pi"] == list(metrics["local"]["auroc"].values())
    assert areas["global CA"] == list(metrics["global"]["auroc"].values())
    assert areas["local Pi + global CA"] == list(metrics["auroc"].values())


# ---------------------------------------------------------------------------------------------- pairs of trainings


def test_what_a_student_learns_does_not_depend_on_the_others_loss(data_root, recipe, tmp_path):
    """What allows to put pairs together from separate trainings."""
    category = open_category(data_root, "screw_bag")
    states = []
    for loss in ("contextual-affinity", "flattened-cosine"):
        detector = start_run(tmp_path / loss, category, dataclasses.replace(recipe, global_loss=loss), holdout=0)
        states.append(detector.model.state_dict())
    same = {name for name in states[0] if torch.equal(states[0][name], states[1][name])}
    assert {name for name in states[0] if name.startswith("local_")} <= same
    assert any(name not in same for name in states[0] if name.startswith("global_"))


def test_a_pair_has_the_maps_of_its_students(run_tiny, tmp_path, data_root):
    run_tiny("ablation-students")
    runs = tmp_path / "out" / "runs" / "screw_bag"

    def detector(name):
        return load_run(runs / name / "seed-0", "cpu")[0]

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    whole, local, global_ = (detector(n).maps(images) for n in ("dskd", "local-contextual-affinity", "global-cosine"))
    joined = join(detector("local-contextual-affinity"), detector("global-cosine")).maps(images)
    np.testing.assert_array_equal(joined.local, local.local)
    np.testing.assert_array_equal(joined.global_, global_.global_)
    np.testing.assert_allclose(joined.combined, local.local + global_.global_, rtol=1e-5, atol=1e-5)
    again = join(detector("dskd"), detector("dskd")).maps(images)
    np.testing.assert_array_equal(again.combined, whole.combined)
    mixed = join(detector("dskd"), detector("global-cosine")).maps(images)
    np.testing.assert_array_equal(mixed.local, whole.local)
    np.testing.assert_array_equal(mixed.global_, global_.global_)


# ---------------------------------------------------------------------------------------------------- what restarts


@pytest.mark.parametrize(
    "damage", ["none", "no metrics", "broken metrics", "evaluate", "no scores", "image", "mask", "content of a mask"]
)
def test_figures_are_computed_again_only_if_they_are_of_something_else(run_tiny, two_categories, tmp_path, damage, cli):
    run_tiny("loco", data_root=two_categories, categories=["screw_bag"])
    run = tmp_path / "out" / RUN
    before = state(tmp_path / "out")
    category = two_categories / "screw_bag"
    if damage == "no metrics":
        (run / "metrics.json").unlink()
    elif damage == "broken metrics":
        (run / "metrics.json").write_text('{"auroc": ')
    elif damage == "evaluate":
        assert cli("evaluate", run, "--threshold", "0").code == 0
    elif damage == "no scores":
        (run / "scores.csv").unlink()
    elif damage == "image":
        (category / "test" / "good" / "003.png").unlink()
    elif damage == "mask":
        shutil.rmtree(category / "ground_truth" / "logical_anomalies" / "002")
    elif damage == "content of a mask":  # not its name or size
        mask = category / "ground_truth" / "logical_anomalies" / "002" / "000.png"
        mask.write_bytes(bytes(mask.stat().st_size))
    outcome, told = run_tiny("loco", data_root=two_categories, categories=["screw_bag"])
    if damage == "content of a mask":
        (failure,) = outcome.failures
        assert failure.startswith(f"screw_bag: the mask {mask} is unusable")
        assert told.pop(1) == f"failed: {failure}"
        assert outcome.tables[1].rows[-1].cells[1].value is not None  # AUROC of logical anomalies
        # Also when the figures are there already.
        assert run_tiny("loco", data_root=two_categories, categories=["screw_bag"])[0].failures == [failure]
    else:
        assert outcome.failures == []
    assert [sentence.split(": ")[1] for sentence in told] == [
        "was trained before",
        *([] if damage == "none" else ["evaluated"]),
    ]
    after = state(tmp_path / "out")
    weights = f"{RUN}/weights.safetensors"
    assert after[weights] == before[weights]
    same = after[f"{RUN}/metrics.json"][1] == before[f"{RUN}/metrics.json"][1]
    assert same == ("image" not in damage and "mask" not in damage)
    if "mask" in damage:
        assert any("no sPRO of logical anomalies" in note for note in outcome.notes)


@pytest.fixture(scope="module")
def long_command(data_root, tiny_arguments):
    """Two trainings long enough to be killed in; the output folder comes last."""
    recipe = without_gccb(tiny_arguments)
    recipe[recipe.index("--epochs") + 1] = "10"
    return ["reproduce", "loco", "--data-root", str(data_root), *recipe, "--seeds", "2", "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def undisturbed(long_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main([*long_command, str(out)]) == 0
    return (out / "table-loco.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_it_goes_on(long_command, undisturbed, cli, tmp_path, number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "dskd_fast", *long_command, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        # In the middle of the second training.
        for line in process.stdout:
            if line.startswith("screw_bag, dskd, seed 1: step"):
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert err.endswith("dskd-fast: stopped and saved: the same command goes on from there\n")
    else:
        assert process.returncode == -number
    assert not (out / "table-loco.txt").exists()
    assert (out / RUN / "metrics.json").is_file()
    assert not (out / RUN.replace("seed-0", "seed-1") / "weights.safetensors").exists()
    finished = {name: found for name, found in state(out).items() if "seed-0" in name}
    assert len(finished) >= 5

    result = cli(*long_command, out)
    assert (result.code, result.err) == (0, "")
    assert "screw_bag, dskd, seed 0: was trained before" in result.out
    assert "seed 0: evaluated" not in result.out
    assert "screw_bag, dskd, seed 1: trained" in result.out
    assert {name: found for name, found in state(out).items() if "seed-0" in name} == finished
    assert (out / "table-loco.csv").read_bytes() == undisturbed
    assert [path for path in out.rglob(".*") if path.is_file()] == []


def test_another_recipe_does_not_replace_the_tables(run_tiny, recipe, tmp_path):
    run_tiny("loco")
    table = (tmp_path / "out" / "table-loco.txt").read_bytes()
    for different, message in (({"epochs": 2}, "epochs 1, not 2"), ({"lr": 0.1}, "lr 0.005, not 0.1")):
        with pytest.raises(UserError, match=f"was begun with {message}: choose another --out"):
            run_tiny("loco", recipe=dataclasses.replace(recipe, **different))
    assert (tmp_path / "out" / "table-loco.txt").read_bytes() == table


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_category_with_a_bad_image_does_not_stop_the_others(run_tiny, two_categories, split):
    bad = two_categories / "juice_bottle" / split / "good" / "001.png"
    bad.write_bytes(bad.read_bytes()[:300])
    outcome, _ = run_tiny("loco", data_root=two_categories, seeds=2)
    (failure,) = outcome.failures
    assert failure.startswith("juice_bottle: ")
    assert str(bad) in failure
    spro, _, details = outcome.tables
    assert list(spro.columns) == ["screw_bag (synthetic)", "juice_bottle", "mean"]
    assert [str(cell) for cell in spro.rows[-1].cells][1:] == ["-", "-"]
    assert spro.rows[-1].cells[0].seeds == 2
    assert [str(cell) for cell in details.rows[1].cells] == ["-"] * 6
    assert f"Failed: {failure}" in outcome.notes
    bad.unlink()
    shutil.copy(bad.with_name("000.png"), bad)
    outcome, told = run_tiny("loco", data_root=two_categories, seeds=2)
    assert outcome.failures == []
    assert ("juice_bottle, dskd, seed 1: trained" in told) == (split == "train")
    assert "juice_bottle, dskd, seed 1: evaluated" in told
    assert None not in [cell.value for cell in outcome.tables[0].rows[-1].cells]


def test_a_category_that_cannot_be_opened_does_not_stop_the_others(run_tiny, two_categories):
    shutil.rmtree(two_categories / "juice_bottle" / "test")
    outcome, _ = run_tiny("loco", data_root=two_categories)
    (failure,) = outcome.failures
    assert "juice_bottle has no test images" in failure
    assert outcome.tables[0].rows[-1].cells[0].value is not None


def test_a_training_that_fails_leaves_its_rows_empty(run_tiny, monkeypatch, tmp_path):
    real = reproduction.ensure_run

    def ensure_run(folder, category, options, **arguments):
        if options.global_loss == "cosine":
            raise UserError("the loss is no longer finite")
        return real(folder, category, options, **arguments)

    monkeypatch.setattr(reproduction, "ensure_run", ensure_run)
    outcome, _ = run_tiny("ablation-students")
    assert outcome.failures == ["screw_bag, global-cosine, seed 0: the loss is no longer finite"]
    rows = {row.label: row.cells[-1].value for row in outcome.tables[2].rows}
    empty = {label for label, value in rows.items() if value is None}
    # The local student with Pi has its figures from a pair with the one that failed.
    assert empty == {"local Pi", "global Pi", "local Pi + global Pi"}


def test_weights_that_cannot_be_had_are_known_before_anything_is_done(run_tiny, recipe, tmp_path):
    missing = dataclasses.replace(recipe, teacher_weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(WeightsUnavailable, match="nowhere"):
        run_tiny("loco", recipe=missing)
    # So other weights can be given for the same folder.
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_are_known_before_anything_is_done(run_tiny, recipe, tmp_path):
    with pytest.raises(UserError, match="image size 65 does not fit"):
        run_tiny("loco", recipe=dataclasses.replace(recipe, image_size=65))
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_temperatures_are_not_even_begun(run_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduction.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'needs matplotlib.*pip install "dskd-fast\[plots\]"'):
        run_tiny("ablation-temperature")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_a_user_error(run_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run_tiny("loco", out=tmp_path / "file" / "out")


# --------------------------------------------------------------------------------------------------------- figures


def test_the_examples_are_the_median_images_with_the_maps_of_the_run(run_tiny, data_root, tmp_path):
    run_tiny("loco")
    category = open_category(data_root, "screw_bag")
    with (tmp_path / "out" / RUN / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = list(reproduction._medians(category, tmp_path / "out" / RUN / "scores.csv"))
    for (index, score), kind in zip(chosen, ("good", "structural", "logical"), strict=True):
        assert category.test[index].kind == kind
        scores = [float(row["score"]) for row in rows if row["type"] == kind]
        assert sum(s < score for s in scores) == (len(scores) - 1) // 2
    sheet = np.asarray(Image.open(tmp_path / "out" / "examples" / "screw_bag.png"))
    # Each photograph is in the first column, pixel by pixel (it is smaller than a tile).
    for index, _ in chosen:
        photograph = np.asarray(Image.open(category.test[index].path).convert("RGB"))
        height, width = photograph.shape[:2]
        found = [
            y for y in range(len(sheet) - height) if np.array_equal(sheet[y : y + height, 6 : 6 + width], photograph)
        ]
        assert len(found) == 1
    with Image.open(tmp_path / "out" / "examples-loco.png") as overview:
        np.testing.assert_array_equal(np.asarray(overview), sheet)


def test_the_temperatures_are_plotted(run_tiny, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(experiments, "TEMPERATURES", (0.5, 1.0))
    monkeypatch.setattr(reproduction, "TEMPERATURES", (0.5, 1.0))
    outcome, told = run_tiny("ablation-temperature")
    assert [sentence.split(", ")[1] for sentence in told if sentence.endswith(": trained")] == [
        "dskd",
        "global-temperature-0.5",
    ]
    assert [path.name for path in outcome.files][-2:] == [
        "figure-ablation-temperature.png",
        "figure-ablation-temperature.svg",
    ]
    options = load_run(tmp_path / "out" / "runs" / "screw_bag" / "global-temperature-0.5" / "seed-0", "cpu")[1]
    assert (options.temperature, options.students) == (0.5, "global")


def test_condensing_blocks_are_trained_as_the_rows_say(run_tiny, recipe, tmp_path):
    outcome, _ = run_tiny("ablation-gccb", recipe=dataclasses.replace(recipe, gccb=None))
    assert outcome.failures == []
    folders = sorted(path.name for path in (tmp_path / "out" / "runs" / "screw_bag").iterdir())
    here = [label.split("here ")[1].rstrip(")") for row in outcome.tables[0].rows if "here" in (label := row.label)]
    assert folders == sorted(["dskd", "global-gccb-0", *(f"global-gccb-{g}" for i, g in enumerate(here) if i != 2)])
    config = json.loads((tmp_path / "out" / RUN / "config.json").read_text())
    assert config["resolved"]["gccb"] == int(here[2])


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(data_root, tiny_arguments, tmp_path):
    recipe = without_gccb(tiny_arguments)
    return ["reproduce", "loco", "--data-root", data_root, "--out", tmp_path / "out", "--seeds", "1", *recipe]


def test_the_command_prints_the_table_and_where_it_is(cli, command, tmp_path):
    result = cli(*command)
    assert (result.code, result.err) == (0, "")
    written = (tmp_path / "out" / "table-loco.txt").read_text()
    assert written in result.out
    for text in ("DSKD, here", "0.730", "NOT run here", "epochs 1, batch size 4", "seed 0 alone"):
        assert text in " ".join(written.split())
    assert str(tmp_path / "out" / "examples-loco.png") in result.out.splitlines()
    options = json.loads((tmp_path / "out" / RUN / "config.json").read_text())["options"]
    assert (options["epochs"], options["batch_size"], options["image_size"], options["gccb"]) == (1, 4, 64, None)


def test_a_failure_is_exit_code_2_with_a_table(cli, command, two_categories):
    bad = two_categories / "juice_bottle" / "train" / "good" / "001.png"
    bad.write_bytes(b"")
    command[3] = two_categories
    result = cli(*command)
    assert result.code == 2
    assert result.err.startswith("dskd-fast: juice_bottle: ")
    assert result.err.count("\n") == 1
    assert "DSKD, here" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--categories", "pushpins"], "no category pushpins"),
        (["--data-root", "nowhere"], "nowhere does not exist"),
        (["--teacher", "nonsense"], "no model 'nonsense'"),
    ],
)
def test_mistakes_are_one_sentence(cli_error, command, arguments, message, tmp_path):
    assert message in cli_error(*command, *arguments)
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_seeds_are_a_number(cli, value):
    code, _, err = cli("reproduce", "loco", "--seeds", value)
    assert code == 2
    assert "argument --seeds" in err


def test_help_names_the_tables_and_the_defaults(cli):
    out = " ".join(cli("reproduce", "--help").out.split())
    for text in (
        "ablation-temperature",
        "(default: 3)",
        "(default: 200)",
        "(default: reproduction)",
        "--teacher-weights",
    ):
        assert text in out
