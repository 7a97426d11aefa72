from pathlib import Path
from types import SimpleNamespace

import pytest

from dskd_fast.paper.comparison import Results, notes_on, tables_of
from dskd_fast.paper.plan import Part, Plan, contestants_of
from dskd_fast.paper.published import read_paper
from dskd_fast.runs.options import TrainingOptions

PAPER = read_paper()
LOCO = PAPER["loco"]["categories"]
RECIPE = TrainingOptions("wide_resnet50_2")


def part(name, *, is_synthetic=False, is_papers=True, logical=3, validation=4, problem=None, unused=()):
    counts = {"train": 12, "validation": validation, "test/good": 4, "test/structural": 3, "test/logical": logical}
    category = SimpleNamespace(n_images=counts, validation=("x",) * validation, unused_summary=list(unused))
    return Part(name, None if problem else category, problem, is_synthetic, is_papers)


def metrics(structural, logical, absent=()):
    mean = None if None in (structural, logical) else (structural + logical) / 2
    figures = {"structural": structural, "logical": logical, "mean": mean}
    auroc = {kind: None if value is None else value + 0.05 for kind, value in figures.items()}
    one = {"auroc": auroc, "spro": figures, "spro_at": {"0.05": figures}}
    local = {"auroc": auroc, "spro": dict.fromkeys(figures, 0.111), "spro_at": {}}
    calibrated = one | {"auroc": {kind: value and value + 0.1 for kind, value in figures.items()}}
    return one | {"local": local, "global": local, "calibrated": calibrated, "absent": list(absent)}


def results(experiment, parts, figures, seeds=1, recipe=RECIPE):
    """figures: (seed, part's name) -> metrics, the same for every pair."""
    contestants = contestants_of(experiment, recipe, PAPER)
    plan = Plan(experiment, Path("data"), parts, contestants, recipe, seeds, PAPER)
    found = {(seed, name, pair): m for (seed, name), m in figures.items() for pair in plan.pairs}
    return Results(plan, found)


def texts(table, label):
    (row,) = [row for row in table.rows if row.label == label]
    return [str(cell) for cell in row.cells]


def on_loco(seeds=1):
    values = {(s, name): metrics(0.5 + 0.1 * i + 0.02 * s, 0.3) for s in range(seeds) for i, name in enumerate(LOCO)}
    return results("loco", [part(name) for name in LOCO], values, seeds)


def test_the_papers_rows_stand_above_ours():
    spro, auroc, details, _ = tables_of(on_loco())
    assert list(spro.columns) == [*LOCO, "mean"]
    assert [row.source for row in spro.rows] == ["paper"] * 11 + ["here"] * 2
    assert texts(spro, "DSKD") == ["0.568", "0.627", "0.825", "0.767", "0.865", "0.730"]
    assert texts(spro, "DSKD, here") == ["0.400", "0.450", "0.500", "0.550", "0.600", "0.500"]
    assert texts(auroc, "GCAD") == ["0.806", "0.860", "0.833"]
    assert texts(auroc, "DSKD, here") == ["0.750", "0.350", "0.550"]
    assert texts(details, "pushpins") == ["0.750", "0.350", "0.550", "0.700", "0.300", "0.500"]
    assert texts(details, "mean") == ["0.750", "0.350", "0.550", "0.700", "0.300", "0.500"]


def test_the_spread_of_a_mean_is_that_of_the_seeds_means_and_a_seed_that_failed_is_left_out_and_counted():
    found = on_loco(seeds=2)
    spro = tables_of(found)[0]
    # Each seed's mean of both halves is 0.01 above the one before: a deviation of 0.01 / sqrt(2).
    assert texts(spro, "DSKD, here")[0] == "0.405 ±0.007"
    assert texts(spro, "DSKD, here")[-1] == "0.505 ±0.007"
    del found._metrics[1, "pushpins", found.plan.pairs[0]]
    contestant = found.plan.contestants[0]
    assert found.of(found.plan.parts[2], contestant, "spro", "mean").seeds == 1
    assert found.mean(contestant, "spro", "mean").seeds == 1
    assert found.of(found.plan.parts[0], contestant, "spro", "mean").seeds == 2


def test_mvtec_ads_logical_mean_is_over_the_categories_that_have_logical_images():
    parts = [part("cable"), part("wood", logical=0, validation=0)]
    values = {(0, "cable"): metrics(0.5, 0.4), (0, "wood"): metrics(0.7, None, ["no logical test images, so nothing"])}
    found = results("mvtec-ad", parts, values)
    table, details, _ = tables_of(found)
    assert list(table.columns)[:2] == ["AUROC structural", "sPRO@0.05 structural"]
    assert texts(table, "PatchCore-25") == ["0.985", "0.790", "0.998", "0.619", "0.992", "0.705"]
    assert texts(table, "DSKD, here") == ["0.650", "0.600", "0.450", "0.400", "0.550", "0.500"]
    assert texts(details, "wood") == ["0.750", "-", "-", "0.700", "-", "-"]
    notes = " ".join(notes_on(found, []))
    assert "37 of MVTec AD's test images" in notes
    assert "wood: no logical test images" in notes
    assert "normalised by the training images" in notes


@pytest.mark.parametrize("how", ["fails", "without masks", "cannot be opened"])
def test_a_missing_figure_leaves_no_mean_that_would_pass_for_one(how):
    parts = [part("cable"), part("wood", problem="it is gone" if how == "cannot be opened" else None)]
    values, failures = {(0, "cable"): metrics(0.5, 0.4)}, ["wood: it is gone"]
    if how == "without masks":
        values[0, "wood"], failures = metrics(None, None, ["no sPRO of structural anomalies: no masks"]), []
    found = results("mvtec-ad", parts, values)
    table, details, _ = tables_of(found)
    assert texts(table, "DSKD, here") == ["-"] * 6
    assert texts(details, "cable")[3] == "0.500"
    notes = notes_on(found, failures)
    assert any("wood: it is gone" in note or "wood: no sPRO of structural" in note for note in notes)


def test_ablations_have_both_beside_each_other_and_the_misprint_marked():
    parts = [part(name) for name in LOCO]
    found = results("ablation-students", parts, {(0, name): metrics(0.6, 0.4) for name in LOCO})
    beside, by_category, areas, areas_by_category = tables_of(found)
    assert list(beside.columns) == [f"{s} {k}" for s in ("paper", "here") for k in ("structural", "logical", "mean")]
    assert texts(beside, "local CA + global CA") == ["0.752", "0.678", "0.708*", "0.600", "0.400", "0.500"]
    assert texts(beside, "local Pi") == ["0.739", "0.474", "0.607", "0.111", "0.111", "0.111"]
    (remark,) = beside.remarks
    assert "local CA + global CA, paper mean" in remark
    assert ".715" in remark
    assert [table.remarks for table in (by_category, areas, areas_by_category)] == [[]] * 3
    assert texts(by_category, "local Pi + global CA") == ["0.500"] * 6
    assert texts(areas, "local Pi + global CA") == ["0.650", "0.450", "0.550"]


def test_the_notes_tell_the_papers_categories_and_every_difference_of_the_recipe():
    notes = " ".join(notes_on(on_loco(), []))
    for text in (
        "Taken for categories of MVTec LOCO AD by their names",
        "seed 0 alone, so no spread",
        "Recipe: the paper's (teacher wide_resnet50_2, image size 256, epochs 200, batch size 16, lr 0.005",
    ):
        assert text in notes
    assert not any(text in notes for text in ("NOT", "ours over the"))
    recipe = TrainingOptions("lite", image_size=128, epochs=8, lr=0.01, averaging=0.9, precision="bf16")
    found = results("loco", [part("x", is_papers=False)], {(0, "x"): metrics(0.6, 0.4)}, recipe=recipe)
    notes = " ".join(notes_on(found, []))
    ours = "teacher lite, image size 128, epochs 8, lr 0.01, averaging 0.9, precision bf16. That is NOT"
    papers = "teacher wide_resnet50_2, image size 256, epochs 200, lr 0.005, averaging 0.0, precision fp32."
    assert f"Recipe here: {ours}" in notes
    assert f"which has {papers}" in notes
    assert "batch size" not in notes


def test_other_data_has_no_printed_figures_and_the_notes_say_so():
    unused = [{"files": "formats that are not read", "n_files": 1, "first": ["test/bad/a.gif"]}]
    parts = [part("screw_bag", is_synthetic=True, is_papers=False), part("board", is_papers=False, unused=unused)]
    found = results("loco", parts, {(0, p.name): metrics(0.6, 0.4) for p in parts})
    spro = tables_of(found)[0]
    assert list(spro.columns) == ["screw_bag (synthetic)", "board", "mean"]
    assert texts(spro, "DSKD") == ["-", "-", "0.730"]
    notes = " ".join(notes_on(found, []))
    for text in (
        "MVTec LOCO AD was NOT run",
        "screw_bag (drawn by dskd-fast; 12 training and 4 validation images",
        "test images: 4 good, 3 structural, 3 logical",
        "over the 5 categories of MVTec LOCO AD, ours over the 2 here",
        "board: not used: 1 image file (formats that are not read): test/bad/a.gif.",
    ):
        assert text in notes
